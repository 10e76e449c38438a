"""DINOv2 (arXiv 2304.07193), with registers (arXiv 2309.16588), and any other vision transformer of timm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import timm

from prism_deco.backbones.base import BACKBONES
from prism_deco.backbones.tower import Channels, Tower
from prism_deco.backbones.trunks import TimmTrunk, Trunk, register_architectures
from prism_deco.config.registry import unknown


@BACKBONES.register("dinov2")
@BACKBONES.register("timm")
class Dinov2Backbone(Tower):
    """`model` is a timm model name; pixels are normalised as timm does for that model (ImageNet for DINOv2)."""

    def build_trunk(self, model: str, image_size: int | None, layers: Sequence[int]) -> Trunk:
        if not timm.is_model(model):
            register_architectures()
        if not timm.is_model(model):
            raise unknown("timm model", model, timm.list_models("*dinov2*"))
        config = timm.get_pretrained_cfg(model)
        assert config is not None
        self.mean, self.std = cast(Channels, config.mean), cast(Channels, config.std)
        vit = timm.create_model(model, pretrained=False, num_classes=0)
        return TimmTrunk(vit, model, image_size or config.input_size[-1], layers)
