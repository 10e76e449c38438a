"""SigLIP (arXiv 2303.15343): open_clip's models with a timm trunk."""

from __future__ import annotations

from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD

from prism_deco.backbones.base import BACKBONES
from prism_deco.backbones.clip import ClipBackbone


@BACKBONES.register("siglip")
class SiglipBackbone(ClipBackbone):
    """`model` is an open_clip model name; pixels are normalised to -1..1.

    timm and open_clip, and so PRISM, use the exact GELU. The original code (big_vision) and the Hugging Face port
    use its tanh approximation, so the same weights give slightly different features there.
    """

    mean = IMAGENET_INCEPTION_MEAN
    std = IMAGENET_INCEPTION_STD
