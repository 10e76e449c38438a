"""A backbone whose features are ready."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prism_deco.backbones import VisionBackbone
from prism_deco.backbones.base import FEATURES
from prism_deco.vlm import VLM


class CachedBackbone(VisionBackbone):
    """Stands in for a backbone while a model is trained on cached features.

    The towers are no part of it: they are neither moved to the device nor sharded, and pixels that come along all the
    same are computed where they are.

    Args:
        backbone: the towers.
        tokens: cached features T of an image.
        dtype: of these.
    """

    def __init__(self, backbone: VisionBackbone, tokens: int, dtype: torch.dtype):
        super().__init__()
        self._aside = (backbone,)  # a tuple keeps it out of nn.Module's sight
        self._tokens, self._dtype = tokens, dtype
        self.towers, self.transform = backbone.towers, backbone.transform
        self.image_size, self.patch_size = backbone.image_size, backbone.patch_size
        self.grid, self.embed_dim = backbone.grid, backbone.embed_dim

    @property
    def blocks(self) -> list[nn.Module]:
        return []

    def features(self, pixels: Mapping[str, Tensor]) -> Tensor:
        (backbone,) = self._aside
        there = next(backbone.parameters()).device
        here = next(iter(pixels.values())).device
        return backbone({tower: values.to(there) for tower, values in pixels.items()}).to(here)

    def blank(self, device: torch.device) -> dict[str, Tensor]:
        return {FEATURES: torch.zeros(1, self._tokens, self.embed_dim, dtype=self._dtype, device=device)}

    def sha256(self) -> str:
        return self._aside[0].sha256()

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedBackbone:
        return CachedBackbone(self._aside[0], self._tokens, self._dtype)


@contextmanager
def at_rest(vlm: VLM, tokens: int, dtype: torch.dtype) -> Iterator[None]:
    """Puts the towers of a model aside for as long as it is given cached features only."""
    backbone = vlm.backbone
    vlm.backbone = CachedBackbone(backbone, tokens, dtype)
    try:
        yield
    finally:
        vlm.backbone = backbone
