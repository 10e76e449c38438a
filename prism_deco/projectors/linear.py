"""The uncompressed baseline: an MLP on every patch (LLaVA-1.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_deco.errors import UsageError
from prism_deco.projectors.base import PROJECTORS, Projector
from prism_deco.projectors.layers import build_mlp


@PROJECTORS.register("linear")
class Linear(Projector):
    """One visual token per patch.

    Args:
        num_tokens: None, or the number of patches.
        mlp_depth: linear layers of the MLP.
        mlp_ratio: width of its first hidden layer as a multiple of `in_dim`; None takes `out_dim`.
    """

    compresses = False

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_grid: tuple[int, int],
        num_tokens: int | None = None,
        *,
        mlp_depth: int = 2,
        mlp_ratio: float | None = None,
    ):
        super().__init__(in_dim, out_dim, in_grid, out_grid=in_grid)
        if num_tokens is not None and num_tokens != self.num_tokens:
            raise UsageError(
                f"linear keeps all {self.num_tokens} patches of the grid {in_grid[0]}x{in_grid[1]} and cannot make "
                f"num_tokens={num_tokens}: leave it at null, or choose a compressing projector such as avgpool."
            )
        self.mlp = build_mlp(in_dim, out_dim, mlp_depth, ratio=mlp_ratio)

    def project(self, features: Tensor) -> Tensor:
        """float[B, N, in_dim] -> float[B, N, out_dim]."""
        return self.mlp(features)

    def query_to_patch(self) -> Tensor:
        """float[N, N]: the identity."""
        return torch.eye(self.num_tokens, device="cpu")
