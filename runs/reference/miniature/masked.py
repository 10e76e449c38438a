"""Masked image modelling in place of DINOv2: it uses images only, neither captions nor labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
from einops import rearrange, reduce
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import prism_deco.miniature.architectures  # noqa: F401  (registers the miniature's architectures)

_BINS = 9
_CELL = 4


class MaskedPretraining(nn.Module):
    """Blanks patches and predicts them and their neighbours with linear heads.

    There are two targets: pixels, as in SimMIM (arXiv 2111.09886), and histograms of gradient orientations, as in
    MaskFeat (arXiv 2112.09133), which emphasise edges and corners. Unlike in both papers, every patch, blanked or not,
    predicts the 3x3 patches around it. With blanked patches alone, a tower of this size and schedule learns hardly more
    than random weights hold.

    Args:
        model: timm's name of the architecture.
        captions: not used.
        seed: seeds the masks.
    """

    max_masked = 0.5
    """Upper bound of the fraction of blanked patches, which is drawn uniformly from 0 per image."""
    contrast_floor = 0.5
    """Added to a window's standard deviation, so that the faint noise of an empty background is not amplified."""

    def __init__(self, model: str, captions: Sequence[str], seed: int):
        super().__init__()
        self.vit = cast(VisionTransformer, timm.create_model(model, num_classes=0))
        self.patch = cast(Any, self.vit.patch_embed).feat_ratio()
        window = 3 * self.patch
        self.pixels = nn.Linear(self.vit.embed_dim, 3 * (window // 2) ** 2)
        self.gradients = nn.Linear(self.vit.embed_dim, _BINS * (window // _CELL) ** 2)
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, images: Tensor, captions: Sequence[str] = ()) -> Tensor:
        """float[B, 3, S, S] -> loss, float[]."""
        tokens = self.tokens(images)
        return F.mse_loss(self.pixels(tokens), self.pixel_targets(images)) + F.mse_loss(
            self.gradients(tokens), self.gradient_targets(images)
        )

    def tokens(self, images: Tensor) -> Tensor:
        """float[B, 3, S, S] -> float[B, N, D]: patch features of randomly blanked images."""
        height, width = (side // self.patch for side in images.shape[-2:])
        share = self.max_masked * torch.rand(len(images), 1, 1, 1, generator=self.generator)
        masked = torch.rand(len(images), 1, height, width, generator=self.generator) < share
        blanked = images.masked_fill(F.interpolate(masked.float(), scale_factor=self.patch).bool(), 0.0)
        return self.vit.forward_features(blanked)[:, self.vit.num_prefix_tokens :]

    def pixel_targets(self, images: Tensor) -> Tensor:
        """float[B, 3, S, S] -> float[B, N, 3 * (1.5 * patch)^2]: half resolution, standardised as in MAE."""
        small = reduce(images, "b c (h i) (w j) -> b c h w", "mean", i=2, j=2)
        windows = self._windows(small, self.patch // 2)
        spread, mean = torch.std_mean(windows, dim=-1, keepdim=True)
        return (windows - mean) / (spread + self.contrast_floor)

    def gradient_targets(self, images: Tensor) -> Tensor:
        """float[B, 3, S, S] -> float[B, N, 9 * (3 * patch / 4)^2], each feature of unit variance over the batch."""
        windows = self._windows(orientation_histograms(images), self.patch // _CELL)
        spread, mean = torch.std_mean(windows, dim=(0, 1))
        return (windows - mean) / (spread + 1e-3)

    def _windows(self, maps: Tensor, step: int) -> Tensor:
        """float[B, C, H, W] -> float[B, N, C * 9 * step^2]: each patch with its neighbours; borders are replicated."""
        padded = F.pad(maps, [step] * 4, mode="replicate")
        return rearrange(F.unfold(padded, 3 * step, stride=step), "b d n -> b n d")

    def evaluate(self, images: Tensor, captions: Sequence[str] = ()) -> dict[str, float]:
        """The explained variance of both targets."""
        tokens = self.tokens(images)
        found = {}
        for name, head, targets in (
            ("pixels", self.pixels, self.pixel_targets(images)),
            ("gradients", self.gradients, self.gradient_targets(images)),
        ):
            found[f"explained_variance_{name}"] = 1 - (F.mse_loss(head(tokens), targets) / targets.var()).item()
        return found


def orientation_histograms(images: Tensor) -> Tensor:
    """float[B, 3, H, W] -> float[B, 9, H/4, W/4]: gradient magnitude per unsigned orientation (HOG, unnormalised).

    Uses central differences and, at each pixel, the channel with the largest gradient.
    """
    padded = F.pad(images, [1] * 4, mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    magnitude, channel = (across.square() + down.square()).sqrt().max(dim=1, keepdim=True)
    angle = torch.atan2(down.gather(1, channel), across.gather(1, channel)) % math.pi
    bins = (angle / math.pi * _BINS).long().clamp(max=_BINS - 1)
    votes = torch.zeros(len(images), _BINS, *images.shape[-2:]).scatter_(1, bins, magnitude)
    return reduce(votes, "b o (h i) (w j) -> b o h w", "mean", i=_CELL, j=_CELL)
