"""CLIP (arXiv 2103.00020): the vision tower of an open_clip model."""

from __future__ import annotations

from collections.abc import Sequence

import open_clip
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import _build_vision_tower
from open_clip.timm_model import TimmModel

from prism_deco.backbones.base import BACKBONES
from prism_deco.backbones.tower import Tower
from prism_deco.backbones.trunks import (
    OpenClipTrunk,
    TimmTrunk,
    Trunk,
    check_image_size,
    register_architectures,
)
from prism_deco.config.registry import unknown


@BACKBONES.register("clip")
class ClipBackbone(Tower):
    """`model` is an open_clip model name; the text tower is never built.

    OpenAI's weights need QuickGELU, x * sigmoid(1.702 x), which open_clip uses in configs with the suffix `-quickgelu`.
    """

    mean = OPENAI_DATASET_MEAN
    std = OPENAI_DATASET_STD

    def build_trunk(self, model: str, image_size: int | None, layers: Sequence[int]) -> Trunk:
        config = open_clip.get_model_config(model)
        if config is None:
            register_architectures()
            config = open_clip.get_model_config(model)
        if config is None:
            raise unknown("open_clip model", model, open_clip.list_models())
        vision = config["vision_cfg"] | ({"image_size": image_size} if image_size else {})
        if vision.get("patch_size"):
            check_image_size(vision["image_size"], vision["patch_size"])
        visual = _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
        if isinstance(visual, TimmModel):
            # open_clip ignores image_size for timm's trunks.
            return TimmTrunk(visual.trunk, model, vision["image_size"], layers)
        return OpenClipTrunk(visual, model, layers)
