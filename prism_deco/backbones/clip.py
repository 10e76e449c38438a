"""CLIP (arXiv 2103.00020): the vision tower of an open_clip model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import open_clip
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import _build_vision_tower
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer

from prism_deco.backbones.base import BACKBONES
from prism_deco.backbones.tower import Tower
from prism_deco.backbones.trunks import (
    OpenClipTrunk,
    Trunk,
    check_class,
    check_image_size,
    register_architectures,
    timm_trunk,
)
from prism_deco.config.registry import unknown


@BACKBONES.register("clip")
class ClipBackbone(Tower):
    """`model` is an open_clip model name; the text tower is never built.

    OpenAI's weights need QuickGELU, x * sigmoid(1.702 x), which open_clip uses in configs with the suffix `-quickgelu`.
    """

    mean = OPENAI_DATASET_MEAN
    std = OPENAI_DATASET_STD

    @classmethod
    def build_trunk(cls, model: str, image_size: int | None, layers: Sequence[int]) -> Trunk:
        config = _config(model)
        vision = config["vision_cfg"] | {"image_size": image_size or cls.native_size(model)}
        if vision.get("patch_size"):
            check_image_size(vision["image_size"], vision["patch_size"])
        visual = _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
        if isinstance(visual, TimmModel):
            # open_clip ignores image_size for timm's trunks.
            return timm_trunk(visual.trunk, model, vision["image_size"], layers)
        check_class(visual, model, VisionTransformer)
        return OpenClipTrunk(visual, layers)

    @classmethod
    def native_size(cls, model: str) -> int:
        return _config(model)["vision_cfg"]["image_size"]


def _config(model: str) -> dict[str, Any]:
    config = open_clip.get_model_config(model)
    if config is None:
        register_architectures()
        config = open_clip.get_model_config(model)
    if config is None:
        raise unknown("open_clip model", model, open_clip.list_models())
    return config
