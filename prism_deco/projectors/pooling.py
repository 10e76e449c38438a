"""Pooling without parameters, then an MLP: DeCo (arXiv 2405.20985, section 3.3) and its max-pooling ablation."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from prism_deco.projectors.base import PROJECTORS, Projector, square_grid
from prism_deco.projectors.layers import build_mlp
from prism_deco.projectors.windows import GridMaxPool, average_matrix, average_pool


class Pooling(Projector):
    """Base of the two: the MLP that follows the pooling.

    Args:
        num_tokens: number of visual tokens, a square.
        mlp_depth: linear layers of the MLP.
        mlp_ratio: width of its first hidden layer as a multiple of `in_dim`; None takes `out_dim`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_grid: tuple[int, int],
        num_tokens: int | None,
        *,
        mlp_depth: int = 2,
        mlp_ratio: float | None = None,
    ):
        super().__init__(in_dim, out_dim, in_grid, square_grid(num_tokens, in_grid))
        self.mlp = build_mlp(in_dim, out_dim, mlp_depth, ratio=mlp_ratio)

    def pool_patches(self, features: Tensor) -> Tensor:
        """float[B, N, in_dim] -> float[B, M, in_dim]."""
        raise NotImplementedError

    def project(self, features: Tensor) -> Tensor:
        """float[B, N, in_dim] -> float[B, M, out_dim]."""
        return self.mlp(self.pool_patches(features))


@PROJECTORS.register("avgpool")
class AvgPool(Pooling):
    """DeCo: 2D adaptive average pooling, then the MLP of `linear`."""

    def pool_patches(self, features: Tensor) -> Tensor:
        """float[B, N, in_dim] -> float[B, M, in_dim]."""
        grid = rearrange(features, "b (h w) d -> b h w d", h=self.in_grid[0])
        return rearrange(average_pool(grid, self.out_grid), "b i j d -> b (i j) d")

    def query_to_patch(self) -> Tensor:
        """float[M, N]: 1/|window| inside a visual token's window, 0 elsewhere."""
        cpu = torch.device("cpu")
        rows = average_matrix(self.in_grid[0], self.out_grid[0], cpu)
        columns = average_matrix(self.in_grid[1], self.out_grid[1], cpu)
        return torch.kron(rows, columns)


@PROJECTORS.register("maxpool")
class MaxPool(Pooling):
    """2D adaptive max pooling, then the MLP. A hook on `pool` sees which patch won each channel."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_grid: tuple[int, int],
        num_tokens: int | None,
        *,
        mlp_depth: int = 2,
        mlp_ratio: float | None = None,
    ):
        super().__init__(in_dim, out_dim, in_grid, num_tokens, mlp_depth=mlp_depth, mlp_ratio=mlp_ratio)
        self.pool = GridMaxPool(in_grid, self.out_grid)

    def pool_patches(self, features: Tensor) -> Tensor:
        """float[B, N, in_dim] -> float[B, M, in_dim]."""
        return self.pool(features)[0]

    def query_to_patch(self) -> Tensor | None:
        """float[M, N]: the identity where each window holds one patch; None elsewhere, as the
        features decide which patch of a window wins."""
        return torch.eye(self.num_tokens, device="cpu") if self.out_grid == self.in_grid else None
