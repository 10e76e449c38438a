"""Attention layers: in a window; and those of the D-Abstractor, self-attention and deformable attention (arXiv
2010.04159, section 4.1).

They return, beside their result, the quantities a relevance map needs, as parts of the autograd graph.

Shapes: B images, M queries, N = h·w patches, K patches of a window, H heads, E channels per head, P points, D = H·E.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from prism_deco.errors import UsageError
from prism_deco.projectors.layers import init_normal
from prism_deco.projectors.windows import cut_windows


def _head_dim(dim: int, heads: int) -> int:
    if dim % heads:
        raise UsageError(f"hidden_dim={dim} does not divide into heads={heads}: choose a multiple.")
    return dim // heads


class SelfAttention(nn.Module):
    """Multi-head self-attention whose position embedding enters queries and keys, and not values (DETR)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.scale = _head_dim(dim, heads) ** -0.5
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """float[B, M, D], position float[B, M, D] -> float[B, M, D], probabilities float[B, H, M, M]."""
        query, key, value = (
            rearrange(projected, "b m (heads e) -> b heads m e", heads=self.heads)
            for projected in (self.query(x + position), self.key(x + position), self.value(x))
        )
        scores = einsum(query, key, "b heads m e, b heads n e -> b heads m n") * self.scale
        probabilities = scores.softmax(dim=-1)
        mixed = einsum(probabilities, value, "b heads m n, b heads n e -> b heads m e")
        return self.out(rearrange(mixed, "b heads m e -> b m (heads e)")), probabilities


class WindowAttention(nn.Module):
    """Multi-head attention of one query to the patches of its window.

    Args:
        in_dim: channels of queries and patches.
        dim: channels D of all heads together.
        heads: number H of heads.
    """

    def __init__(self, in_dim: int, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.scale = _head_dim(dim, heads) ** -0.5
        self.query = nn.Linear(in_dim, dim)
        self.key = nn.Linear(in_dim, dim)
        self.value = nn.Linear(in_dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, grids: tuple[tuple[int, int], tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Attends from queries to patches.

        Args:
            queries: float[B, M, in_dim].
            keys, values: float[B, N, in_dim], what patches are found by and what they give.
            grids: of the patches and of the queries, as `windows.cut_windows` takes them.

        Returns:
            float[B, M, D], probabilities float[B, H, M, K].
        """
        query = rearrange(self.query(queries), "b m (heads e) -> b heads m e", heads=self.heads)
        key, inside = cut_windows(self.key(keys), *grids)
        value, _ = cut_windows(self.value(values), *grids)
        key, value = (rearrange(cut, "b m k (heads e) -> b heads m k e", heads=self.heads) for cut in (key, value))
        scores = einsum(query, key, "b heads m e, b heads m k e -> b heads m k") * self.scale
        if inside is not None:
            scores = scores.masked_fill(~inside, -math.inf)
        probabilities = scores.softmax(dim=-1)
        mixed = einsum(probabilities, value, "b heads m k, b heads m k e -> b heads m e")
        return self.out(rearrange(mixed, "b heads m e -> b m (heads e)")), probabilities


class Sampling(NamedTuple):
    """What one deformable attention looked at."""

    locations: Tensor
    """float[B, M, H, P, 2]: sampled (x, y); (0, 0) and (1, 1) are outer corners of the patch grid."""
    weights: Tensor
    """float[B, M, H, P]: share of each point; sums to 1 over P."""
    values: Tensor
    """float[B, N, H, E]: what the patches offer to each head."""
    sampled: Tensor
    """float[B, M, H, E]: weighted values at the locations, before the output projection."""


def sample(values: Tensor, locations: Tensor, weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bilinear samples of a patch grid, weighted and summed over the points; zero outside the grid.

    Args:
        values: float[B, N, H, E], patches in row-major order.
        locations: float[B, M, H, P, 2], (x, y) with the outer corners of the grid at 0 and 1.
        weights: float[B, M, H, P].
        grid: (h, w) of the patches.

    Returns:
        float[B, M, H, E] in the dtype of `values`; computed in float32 at least.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    samples = F.grid_sample(
        rearrange(values.to(dtype), "b (h w) heads e -> (b heads) e h w", h=grid[0]),
        rearrange(2 * locations.to(dtype) - 1, "b m heads p xy -> (b heads) m p xy"),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    samples = rearrange(samples, "(b heads) e m p -> b m heads p e", heads=values.shape[2])
    return einsum(samples, weights.to(dtype), "b m heads p e, b m heads p -> b m heads e").to(values.dtype)


class DeformableAttention(nn.Module):
    """Each head of a query reads `points` places of one feature map, at learned offsets from a reference point.

    Args:
        dim: channels D of queries and patches.
        heads: number H of heads.
        points: number P of places that a head reads.
        grid: (h, w) of the patches.
        directional: start with head k looking in the k-th compass direction, its points 1..P patches
            away, and uniform weights (Deformable DETR). False is Honeybee's start, which draws all linear
            layers from N(0, 0.02): heads begin near the reference point and learn where to look.
    """

    def __init__(self, dim: int, heads: int, points: int, grid: tuple[int, int], directional: bool = False):
        super().__init__()
        _head_dim(dim, heads)
        self.heads = heads
        self.grid = grid
        self.offsets = nn.Linear(dim, heads * points * 2)
        self.weights = nn.Linear(dim, heads * points)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        if directional:
            self._init_directional(points)
        else:
            self.apply(init_normal)

    @torch.no_grad()
    def _init_directional(self, points: int) -> None:
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, points + 1, dtype=torch.float32)
        offsets = einsum(direction, distance, "heads xy, p -> heads p xy")
        self.offsets.bias.copy_(rearrange(offsets, "heads p xy -> (heads p xy)"))
        for parameter in (self.offsets.weight, self.weights.weight, self.weights.bias, self.value.bias, self.out.bias):
            nn.init.zeros_(parameter)
        for layer in (self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, queries: Tensor, memory: Tensor, reference: Tensor) -> tuple[Tensor, Sampling]:
        """Attends from queries to patches.

        Args:
            queries: float[B, M, D], their position embedding included.
            memory: float[B, N, D], the patches.
            reference: float[1 or B, M, 2], (x, y) with the outer corners of the grid at 0 and 1.

        Returns:
            float[B, M, D], and the `Sampling` it comes from.
        """
        # Coordinates in bfloat16 would be off by up to a tenth of a patch: float32 from here on.
        dtype = torch.promote_types(queries.dtype, torch.float32)
        offsets = rearrange(self.offsets(queries), "b m (heads p xy) -> b m heads p xy", heads=self.heads, xy=2)
        height, width = self.grid
        x, y = offsets.to(dtype).unbind(dim=-1)
        locations = reference.to(dtype)[:, :, None, None] + torch.stack([x / width, y / height], dim=-1)
        logits = rearrange(self.weights(queries), "b m (heads p) -> b m heads p", heads=self.heads)
        weights = logits.to(dtype).softmax(dim=-1)
        values = rearrange(self.value(memory), "b n (heads e) -> b n heads e", heads=self.heads)
        sampled = sample(values, locations, weights, self.grid)
        return self.out(rearrange(sampled, "b m heads e -> b m (heads e)")), Sampling(
            locations, weights, values, sampled
        )
