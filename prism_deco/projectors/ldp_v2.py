"""LDPv2, the projector of MobileVLM V2 (arXiv 2402.03766, section 3.3)."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from prism_deco.projectors.base import PROJECTORS, Projector, square_grid
from prism_deco.projectors.layers import build_mlp
from prism_deco.projectors.windows import average_pool


@PROJECTORS.register("ldp_v2")
class LDPv2(Projector):
    """MLP on every patch -> average pooling -> depthwise 3x3 convolution with a shortcut, which encodes positions.

    Reference: `LDPNetV2Projector` of Meituan-AutoML/MobileVLM `mobilevlm/model/vision_projector.py`.

    Args:
        mlp_depth: linear layers of the MLP.
    """

    def __init__(
        self, in_dim: int, out_dim: int, in_grid: tuple[int, int], num_tokens: int | None, *, mlp_depth: int = 2
    ):
        super().__init__(in_dim, out_dim, in_grid, square_grid(num_tokens, in_grid))
        self.mlp = build_mlp(in_dim, out_dim, mlp_depth)
        self.position = nn.Conv2d(out_dim, out_dim, 3, padding=1, groups=out_dim)

    def project(self, features: Tensor) -> Tensor:
        """float[B, N, in_dim] -> float[B, M, out_dim]."""
        pooled = average_pool(self.mlp(features), self.in_grid, self.out_grid)
        pooled = rearrange(pooled, "b (i j) e -> b e i j", i=self.out_grid[0])
        return rearrange(self.position(pooled) + pooled, "b e i j -> b (i j) e")
