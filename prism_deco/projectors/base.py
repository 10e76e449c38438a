"""The projector interface: patch features of a fixed grid in, visual tokens for the LLM out."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prism_deco.config.registry import Registry
from prism_deco.errors import UsageError


class Projector(nn.Module):
    """Base class: checks shapes; subclasses implement `project`.

    Subclasses take `num_tokens`, the number of visual tokens (a square), instead of `out_grid`.

    Args:
        in_dim: channels D of a patch feature.
        out_dim: embedding size of the LLM.
        in_grid: patch grid (height, width); patches come in row-major order.
        out_grid: grid of the visual tokens (height, width), row-major.

    Attributes:
        num_tokens: number M of visual tokens handed to the LLM.
        scales: the numbers of visual tokens it is trained for, `num_tokens` first; usually no others.
    """

    compresses: ClassVar[bool] = True
    """Whether the number of visual tokens is free; False where every patch becomes one (`linear`)."""

    compute_dtype: ClassVar[torch.dtype | None] = None
    """Dtype that its weights keep when the rest of the model runs in half precision; None: no exception."""

    def __init__(self, in_dim: int, out_dim: int, in_grid: tuple[int, int], out_grid: tuple[int, int]):
        super().__init__()
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.in_grid = in_grid
        self.out_grid = out_grid
        self.num_tokens = out_grid[0] * out_grid[1]
        self.scales: tuple[int, ...] = (self.num_tokens,)

    def project(self, features: Tensor) -> Tensor:
        """float[B, N, in_dim] -> float[B, M, out_dim]."""
        raise NotImplementedError

    def project_to(self, features: Tensor, num_tokens: int) -> Tensor:
        """float[B, N, in_dim] -> float[B, num_tokens, out_dim], for any other of `scales`."""
        raise NotImplementedError

    def forward(self, features: Tensor, num_tokens: int | None = None) -> Tensor:
        """float[B, N, in_dim] -> float[B, M, out_dim]; `UsageError` if features or visual tokens have another shape.

        Args:
            num_tokens: one of `scales`; None is the first.
        """
        height, width = self.in_grid
        if features.ndim != 3 or features.shape[1:] != (height * width, self.in_dim):
            raise UsageError(
                f"{type(self).__name__} was built for features [batch, {height * width}, {self.in_dim}] "
                f"(grid {height}x{width}) and got {list(features.shape)}. Use the backbone's grid and embed_dim."
            )
        if num_tokens in (None, self.num_tokens):
            tokens = self.project(features)
        else:
            tokens = self.project_to(features, num_tokens)
        # A plug-in may return something other than a tensor: its type is reported instead of a shape.
        made = list(getattr(tokens, "shape", [])) or type(tokens).__name__
        promised = [len(features), num_tokens or self.num_tokens, self.out_dim]
        if made != promised:  # extra tokens would spill into the next image's positions
            raise UsageError(f"{type(self).__name__} made visual tokens {made} instead of {promised}.")
        return tokens

    def query_to_patch(self) -> Tensor | None:
        """float[M, N], rows summing to 1: the share of each patch in each visual token, if the geometry alone fixes it;
        None if it depends on the input."""
        return None


def square_grid(num_tokens: int | None, in_grid: tuple[int, int]) -> tuple[int, int]:
    """The square output grid of `num_tokens` visual tokens; `UsageError` if it does not fit `in_grid`."""
    if num_tokens is None:
        raise UsageError("num_tokens=None keeps every patch, which only `linear` can: set it to a square such as 144.")
    side = math.isqrt(max(num_tokens, 0))
    height, width = in_grid
    if num_tokens < 1 or side * side != num_tokens:
        raise UsageError(
            f"num_tokens={num_tokens} is not a square number; near it are {max(side, 1) ** 2} and {(side + 1) ** 2}."
        )
    if side > min(height, width):
        raise UsageError(
            f"num_tokens={num_tokens} ({side}x{side}) does not fit the patch grid {height}x{width}: "
            f"choose at most {min(height, width) ** 2}."
        )
    return side, side


PROJECTORS: Registry[type[Projector]] = Registry("projector", package="prism_deco.projectors")


def build_projector(
    name: str, in_dim: int, out_dim: int, in_grid: tuple[int, int], num_tokens: int | None = None, **options: Any
) -> Projector:
    """Builds the projector registered as `name`.

    Args:
        num_tokens: number of visual tokens, a square; None keeps every patch (`linear` only).
        options: the projector's own arguments; its YAML lists them with their defaults.
    """
    in_grid = (int(in_grid[0]), int(in_grid[1]))
    return PROJECTORS.build(name, in_dim=in_dim, out_dim=out_dim, in_grid=in_grid, num_tokens=num_tokens, **options)
