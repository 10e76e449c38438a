"""Attention layers: within windows, and the D-Abstractor's self-attention and deformable attention (arXiv 2010.04159,
section 4.1).

Besides their result, they return what relevance maps are computed from, as nodes of the autograd graph.

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


class _MultiHead(nn.Module):
    """The projections of multi-head attention from `in_dim` channels to `dim` channels of all heads together."""

    def __init__(self, in_dim: int, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.scale = _head_dim(dim, heads) ** -0.5
        self.query = nn.Linear(in_dim, dim)
        self.key = nn.Linear(in_dim, dim)
        self.value = nn.Linear(in_dim, dim)
        self.out = nn.Linear(dim, dim)


class SelfAttention(_MultiHead):
    """Multi-head self-attention that adds the position embedding to queries and keys, but not to values (DETR)."""

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, dim, heads)

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


class WindowAttention(_MultiHead):
    """Multi-head attention of each query to the patches of its window."""

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, grids: tuple[tuple[int, int], tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Attends from queries to patches.

        Args:
            queries: float[B, M, in_dim].
            keys, values: float[B, N, in_dim], of the patches.
            grids: (h, w) of the patches, (i, j) of the queries.

        Returns:
            float[B, M, D], probabilities float[B, H, M, K].
        """
        query = rearrange(self.query(queries), "b m (heads e) -> b heads m e", heads=self.heads)
        # Projected before cutting, so that overlapping windows share the work: float[B, N, D] -> float[B, M, K, D].
        key, inside = cut_windows(self.key(keys), *grids)
        value, _ = cut_windows(self.value(values), *grids)
        key, value = (rearrange(cut, "b m k (heads e) -> b heads m k e", heads=self.heads) for cut in (key, value))
        scores = einsum(query, key, "b heads m e, b heads m k e -> b heads m k") * self.scale
        if inside is not None:
            # Padding of smaller windows. Each window has a patch, so no row is masked as a whole.
            scores = scores.masked_fill(~inside, -math.inf)
        probabilities = scores.softmax(dim=-1)
        mixed = einsum(probabilities, value, "b heads m k, b heads m k e -> b heads m e")
        return self.out(rearrange(mixed, "b heads m e -> b m (heads e)")), probabilities


class Sampling(NamedTuple):
    """Where one deformable attention sampled, and what it found there."""

    locations: Tensor
    """float[B, M, H, P, 2]: sampled (x, y); (0, 0) and (1, 1) are the outer corners of the patch grid."""
    weights: Tensor
    """float[B, M, H, P]: weight of each point; sums to 1 over P."""
    values: Tensor
    """float[B, N, H, E]: the patches' values for each head."""
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
        float[B, M, H, E] in the dtype of `values`; computed in float32 or wider.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    samples = F.grid_sample(
        rearrange(values.to(dtype), "b (h w) heads e -> (b heads) e h w", h=grid[0]),
        # To -1 .. 1, which are the outer corners with align_corners=False. Heads become part of the batch.
        rearrange(2 * locations.to(dtype) - 1, "b m heads p xy -> (b heads) m p xy"),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    samples = rearrange(samples, "(b heads) e m p -> b m heads p e", heads=values.shape[2])
    return einsum(samples, weights.to(dtype), "b m heads p e, b m heads p -> b m heads e").to(values.dtype)


class DeformableAttention(nn.Module):
    """Each head of a query samples a feature map at `points` learned offsets from a reference point.

    Args:
        dim: channels D of queries and patches.
        heads: number H of heads.
        points: number P of points per head.
        grid: (h, w) of the patches.
        directional: initialise head k to look in the k-th compass direction, its points 1..P patches away, with uniform
            weights (Deformable DETR). False draws all linear layers from N(0, 0.02), as Honeybee: heads start near the
            reference point.
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
        # The larger component becomes 1: point p lies p patches away in rows or in columns.
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, points + 1, dtype=torch.float32)
        offsets = einsum(direction, distance, "heads xy, p -> heads p xy")
        self.offsets.bias.copy_(rearrange(offsets, "heads p xy -> (heads p xy)"))
        # With zero weights, the biases alone decide where a head samples at first, and all its points count alike.
        for parameter in (self.offsets.weight, self.weights.weight, self.weights.bias, self.value.bias, self.out.bias):
            nn.init.zeros_(parameter)
        for layer in (self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, queries: Tensor, memory: Tensor, reference: Tensor) -> tuple[Tensor, Sampling]:
        """Attends from queries to patches.

        Args:
            queries: float[B, M, D], with their position embedding added.
            memory: float[B, N, D], the patches.
            reference: float[1 or B, M, 2], (x, y) with the outer corners of the grid at 0 and 1.

        Returns:
            float[B, M, D], and the `Sampling` behind it.
        """
        # Coordinates in bfloat16 would be off by up to a tenth of a patch: float32 from here on.
        dtype = torch.promote_types(queries.dtype, torch.float32)
        offsets = rearrange(self.offsets(queries), "b m (heads p xy) -> b m heads p xy", heads=self.heads, xy=2)
        height, width = self.grid
        x, y = offsets.to(dtype).unbind(dim=-1)
        # Offsets are in patches, locations in fractions of the grid: float[B, M, H, P, 2].
        locations = reference.to(dtype)[:, :, None, None] + torch.stack([x / width, y / height], dim=-1)
        logits = rearrange(self.weights(queries), "b m (heads p) -> b m heads p", heads=self.heads)
        weights = logits.to(dtype).softmax(dim=-1)
        values = rearrange(self.value(memory), "b n (heads e) -> b n heads e", heads=self.heads)
        sampled = sample(values, locations, weights, self.grid)
        return self.out(rearrange(sampled, "b m heads e -> b m (heads e)")), Sampling(
            locations, weights, values, sampled
        )
