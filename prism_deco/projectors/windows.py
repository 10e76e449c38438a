"""Windows of patch grids: pooling, resizing and cutting, with gradients that are deterministic on every device.

The windows are those of `torch.nn.AdaptiveAvgPool2d`: along a side of `size` patches, output i of `out`
covers the patches floor(i·size/out) up to, but not including, ceil((i+1)·size/out). Neighbours overlap
if `out` does not divide `size` (27 -> 12). Torch's CUDA kernels sum overlapping gradients in an order that
changes between runs; here, averaging and bilinear resizing are products with fixed matrices.

Nothing is stored in buffers: the windows follow from the two sizes, so a module built on the meta
device is complete once its parameters are loaded.

Shapes: B images, N = h x w patches, M = i x j visual tokens, K patches of a window, D channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from prism_deco.projectors.layers import without_autocast


def window_bounds(size: int, out: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Start (inclusive) and end (exclusive) of each window: two int64[out]."""
    index = torch.arange(out, device=device)
    return index * size // out, -(-(index + 1) * size // out)  # -(-a // b) rounds up


def average_matrix(
    size: int, out: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """dtype[out, size]: the share of each patch in each window's average; rows sum to 1."""
    start, end = window_bounds(size, out, device)
    patch = torch.arange(size, device=device)
    inside = ((patch >= start[:, None]) & (patch < end[:, None])).to(dtype)
    return inside / inside.sum(dim=1, keepdim=True)


def bilinear_matrix(
    size: int, out: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """dtype[out, size]: `torch.nn.functional.interpolate(mode="bilinear")` along one side, without antialiasing."""
    # Where each output's centre lies among the patches' centres. A patch's weight falls linearly from 1 there to 0 one
    # patch away.
    centre = (torch.arange(out, device=device, dtype=torch.float32) + 0.5) * (size / out) - 0.5
    patch = torch.arange(size, device=device)
    return (1 - (patch - centre.clamp(0, size - 1)[:, None]).abs()).clamp(min=0).to(dtype)


def centre_matrix(
    size: int, out: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """dtype[out, size]: 1 at the middle patch of each window (the later of two), 0 elsewhere."""
    centre = (2 * torch.arange(out, device=device) + 1) * size // (2 * out)
    return (torch.arange(size, device=device) == centre[:, None]).to(dtype)


Mixing = Callable[..., Tensor]
"""A function that returns the matrix dtype[out, size] for one side, with the signature of `average_matrix`."""


def average_pool(
    features: Tensor, in_grid: tuple[int, int], out_grid: tuple[int, int], matrix: Mixing = average_matrix
) -> Tensor:
    """float[B, N, D] -> float[B, M, D]: the mean over each window, or another `matrix` along both sides.

    Sums are taken in float32 or wider and rounded to the input's dtype once, at the end.
    """
    (h, w), (i, j), device = in_grid, out_grid, features.device
    dtype = torch.promote_types(features.dtype, torch.float32)
    grid = rearrange(features, "b (h w) d -> b h w d", h=h)
    with without_autocast(device):
        # Along columns [B, h, w, D] -> [B, h, j, D], then along rows -> [B, i, j D].
        pooled = matrix(w, j, device, dtype) @ grid.to(dtype)
        pooled = matrix(h, i, device, dtype) @ rearrange(pooled, "b h j d -> b h (j d)")
    return rearrange(pooled, "b i (j d) -> b (i j) d", j=j).to(features.dtype)


def shares(in_grid: tuple[int, int], out_grid: tuple[int, int], matrix: Mixing = average_matrix) -> Tensor:
    """float32[M, N] on the CPU: the share of each patch in each visual token of `average_pool`."""
    rows, columns = (matrix(size, out, torch.device("cpu")) for size, out in zip(in_grid, out_grid, strict=True))
    # Row-major on both sides: token (i, j) takes rows[i, h] * columns[j, w] of patch (h, w).
    return torch.kron(rows, columns)


def window_patches(size: int, out: int, device: torch.device | None = None) -> Tensor:
    """int64[out, K]: the patches of each window, K being the size of the largest; smaller windows repeat their last
    patch."""
    start, end = window_bounds(size, out, device)
    # In Python: reading it from a tensor would synchronise a GPU, and fail on the meta device.
    largest = max(-(-(index + 1) * size // out) - index * size // out for index in range(out))
    return torch.minimum(start[:, None] + torch.arange(largest, device=device), end[:, None] - 1)


def cut_windows(features: Tensor, in_grid: tuple[int, int], out_grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """The patches of each window.

    Returns:
        float[B, M, K, D] of float[B, N, D], row-major within windows; and bool[M, K], False for padding: if `out_grid`
        does not divide `in_grid`, smaller windows are padded with zeros. None: there is no padding.
    """
    (h, w), (i, j), device = in_grid, out_grid, features.device
    if h % i == 0 and w % j == 0:
        return rearrange(features, "b (i r j c) d -> b (i j) (r c) d", i=i, j=j, r=h // i), None
    grid = rearrange(features, "b (h w) d -> b h w d", h=h)
    rows, columns = window_patches(h, i, device), window_patches(w, j, device)
    # [B, h, w, D] -> [B, i, r, w, D] -> [B, i, r, j, c, D].
    cut = rearrange(grid[:, rows][:, :, :, columns], "b i r j c d -> b (i j) (r c) d")
    # Padding repeats the patch before it.
    in_row, in_column = (F.pad(side.diff(dim=1) > 0, (1, 0), value=True) for side in (rows, columns))
    inside = rearrange(in_row[:, None, :, None] & in_column[None, :, None], "i j r c -> (i j) (r c)")
    return cut * inside[..., None], inside


class GridMaxPool(nn.Module):
    """Max pooling over windows; a module, so that a forward hook can read which patches won."""

    def __init__(self, in_grid: tuple[int, int], out_grid: tuple[int, int]):
        super().__init__()
        self.in_grid = in_grid
        self.out_grid = out_grid

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """float[B, N, D] -> maxima float[B, M, D], their patches int64[B, M, D] in 0 .. N-1.

        The first of several equal maxima wins, and it alone receives the gradient (as in `AdaptiveMaxPool2d`).
        """
        (h, w), (i, j), device = self.in_grid, self.out_grid, features.device
        rows, columns = window_patches(h, i, device), window_patches(w, j, device)
        grid = rearrange(features, "b (h w) d -> b h w d", h=h)
        # One side at a time: the first row with the maximum, and in it the first column, is also the first maximum in
        # row-major order. A patch lies in at most two windows of a side, and the sum of two numbers does not depend on
        # their order, so the gradient is deterministic.
        values, offset = grid[:, :, columns].max(dim=3)  # [b, h, j, K, d] over K
        column = columns[:, 0, None] + offset
        values, offset = values[:, rows].max(dim=2)  # [b, i, K, j, d] over K
        row = rows[:, 0, None, None] + offset
        # Of the columns that won each row, those of the winning rows.
        winners = row * w + column.gather(1, row)
        return rearrange(values, "b i j d -> b (i j) d"), rearrange(winners, "b i j d -> b (i j) d")
