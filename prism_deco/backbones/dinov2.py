"""DINOv2 (arXiv 2304.07193), with registers (arXiv 2309.16588): timm's models."""

from __future__ import annotations

import timm
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from prism_deco.backbones.base import BACKBONES
from prism_deco.backbones.tower import Tower
from prism_deco.backbones.trunks import Trunk, register_architectures, timm_trunk
from prism_deco.config.registry import unknown


@BACKBONES.register("dinov2")
class Dinov2Backbone(Tower):
    """`model` is a timm model name."""

    mean = IMAGENET_DEFAULT_MEAN
    std = IMAGENET_DEFAULT_STD

    @classmethod
    def build_trunk(cls, model: str, image_size: int | None, layer: int) -> Trunk:
        size = image_size or cls.native_size(model)
        return timm_trunk(timm.create_model(model, pretrained=False, num_classes=0), size, layer)

    @classmethod
    def native_size(cls, model: str) -> int:
        if not timm.is_model(model):
            register_architectures()
        if not timm.is_model(model):
            raise unknown("timm model", model, timm.list_models("*dinov2*"))
        config = timm.get_pretrained_cfg(model)
        assert config is not None
        return config.input_size[-1]
