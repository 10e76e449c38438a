"""DINOv2 (arXiv 2304.07193), with registers (arXiv 2309.16588), and any other vision transformer of timm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import timm
from timm.models import PretrainedCfg

from prism_deco.backbones.base import BACKBONES
from prism_deco.backbones.tower import Channels, Tower
from prism_deco.backbones.trunks import Trunk, register_architectures, timm_trunk
from prism_deco.config.registry import unknown


@BACKBONES.register("dinov2")
@BACKBONES.register("timm")
class Dinov2Backbone(Tower):
    """`model` is a timm model name; pixels are normalised as timm does for that model (ImageNet for DINOv2)."""

    @classmethod
    def build_trunk(cls, model: str, image_size: int | None, layers: Sequence[int]) -> Trunk:
        native = cls.native_size(model)  # has a side effect: it registers shipped architectures
        vit = timm.create_model(model, pretrained=False, num_classes=0)
        return timm_trunk(vit, model, image_size or native, layers)

    @classmethod
    def native_size(cls, model: str) -> int:
        return _config(model).input_size[-1]

    @classmethod
    def normalisation(cls, model: str) -> tuple[Channels, Channels]:
        config = _config(model)
        return cast(Channels, config.mean), cast(Channels, config.std)


def _config(model: str) -> PretrainedCfg:
    if not timm.is_model(model):
        register_architectures()
    if not timm.is_model(model):
        raise unknown("timm model", model, timm.list_models("*dinov2*"))
    config = timm.get_pretrained_cfg(model)
    assert config is not None
    return config
