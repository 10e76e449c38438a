"""Frozen vision towers: images in, patch features of one transformer block out."""

from prism_deco.backbones.base import BACKBONES, VisionBackbone, build_backbone

__all__ = ["BACKBONES", "VisionBackbone", "build_backbone"]
