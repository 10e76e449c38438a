"""Pooling without parameters, then an MLP: DeCo (arXiv 2405.20985, section 3.3) and its max-pooling ablation."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from prism_deco.projectors.base import PROJECTORS, Projector, square_grid
from prism_deco.projectors.layers import build_mlp
from prism_deco.projectors.windows import GridMaxPool, Mixing, average_matrix, average_pool, shares


class Pooling(Projector):
    """Base of the projectors that mix patches by a fixed matrix and apply an MLP.

    Args:
        mlp_depth: linear layers of the MLP.
        mlp_ratio: width of its first hidden layer as a multiple of `in_dim`; None takes `out_dim`.
        mlp_bias: whether its linear layers have biases.
        after_mlp: apply the MLP to every patch and pool its outputs.
        norm: RMSNorm before the MLP.
    """

    matrix: ClassVar[Mixing] = staticmethod(average_matrix)

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_grid: tuple[int, int],
        num_tokens: int | None,
        *,
        mlp_depth: int = 2,
        mlp_ratio: float | None = None,
        mlp_bias: bool = True,
        after_mlp: bool = False,
        norm: bool = False,
    ):
        super().__init__(in_dim, out_dim, in_grid, square_grid(num_tokens, in_grid))
        self.mlp = build_mlp(in_dim, out_dim, mlp_depth, ratio=mlp_ratio, bias=mlp_bias)
        self.after_mlp = after_mlp
        self.norm = nn.RMSNorm(in_dim, eps=1e-6) if norm else nn.Identity()

    def pool_patches(self, features: Tensor) -> Tensor:
        """float[B, N, D] -> float[B, M, D]."""
        return average_pool(features, self.in_grid, self.out_grid, self.matrix)

    def project(self, features: Tensor) -> Tensor:
        """float[B, N, in_dim] -> float[B, M, out_dim]."""
        if self.after_mlp:
            return self.pool_patches(self.mlp(self.norm(features)))
        return self.mlp(self.norm(self.pool_patches(features)))

    def query_to_patch(self) -> Tensor | None:
        """float[M, N]: the matrix; for `avgpool`, 1/|window| inside a visual token's window and 0 elsewhere."""
        return shares(self.in_grid, self.out_grid, self.matrix)


@PROJECTORS.register("avgpool")
class AvgPool(Pooling):
    """DeCo: 2D adaptive average pooling, then the MLP of `linear`.

    Options give two related projectors. LLaVA-NeXT pools after the MLP (`get_2dPool` of LLaVA-VL/LLaVA-NeXT
    `llava/model/llava_arch.py`, mode `average`): `after_mlp=true`. Gemma 3 (arXiv 2503.19786; transformers
    `gemma3/modeling_gemma3.py`) pools, normalises and applies one linear layer without bias: `norm=true mlp_depth=1
    mlp_bias=false`.
    """


@PROJECTORS.register("maxpool")
class MaxPool(Pooling):
    """2D adaptive max pooling, then the MLP. A forward hook on `pool` sees which patch won each channel."""

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
        """float[M, N]: the identity if each window holds one patch; otherwise None, as the features decide which patch
        wins."""
        return torch.eye(self.num_tokens, device="cpu") if self.out_grid == self.in_grid else None
