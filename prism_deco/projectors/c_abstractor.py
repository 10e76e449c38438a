"""C-Abstractor (Honeybee, arXiv 2312.06742, section 3.2): convolutions around an average pooling."""

from __future__ import annotations

import torch
from einops import rearrange
from timm.layers.norm import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn

from prism_deco.errors import UsageError
from prism_deco.projectors.base import PROJECTORS, Projector, square_grid
from prism_deco.projectors.layers import build_mlp, check_init, init_normal
from prism_deco.projectors.windows import average_pool


def _stage(depth: int, in_dim: int, out_dim: int) -> RegStage:
    """RegNet bottlenecks (timm's defaults: depthwise 3x3, squeeze-excitation 0.25) with channel LayerNorm and SiLU."""
    return RegStage(depth, in_dim, out_dim, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)


@PROJECTORS.register("c_abstractor")
class CAbstractor(Projector):
    """Position table -> RegNet stage -> average pooling -> RegNet stage -> MLP with SiLU.

    Args:
        depth: RegNet blocks in each of the two stages.
        hidden_dim: channels of the convolutions.
        readout_depth: linear layers of the MLP after the second stage.
        position_embedding: add a learned position table to the features.
        init: `normal`: N(0, 0.02) and zero biases, as Honeybee; `torch`: torch's default initialisation, drawn in the
            order of the DeCo authors' code. The position table has the same distribution in both.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_grid: tuple[int, int],
        num_tokens: int | None,
        *,
        depth: int = 3,
        hidden_dim: int = 1024,
        readout_depth: int = 2,
        position_embedding: bool = True,
        init: str = "normal",
    ):
        super().__init__(in_dim, out_dim, in_grid, square_grid(num_tokens, in_grid))
        check_init(init)
        if depth < 1:
            raise UsageError(f"c_abstractor with depth={depth} has no convolutions: choose 1 or more, or avgpool.")
        table = torch.empty(1, in_grid[0] * in_grid[1], in_dim) if position_embedding else None
        if init == "torch" and table is not None:
            nn.init.trunc_normal_(table, std=0.02)  # drawn first, as in the authors' code
        self.stage1 = _stage(depth, in_dim, hidden_dim)
        self.stage2 = _stage(depth, hidden_dim, hidden_dim)
        self.readout = build_mlp(hidden_dim, out_dim, readout_depth, activation=nn.SiLU)
        if init == "normal":
            self.apply(init_normal)
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
        self.position = nn.Parameter(table) if table is not None else None

    def project(self, features: Tensor) -> Tensor:
        """float[B, N, in_dim] -> float[B, M, out_dim]."""
        if self.position is not None:
            features = features + self.position
        # The stages see maps [B, D, h, w]; pooling takes sequences [B, N, D].
        x = self.stage1(rearrange(features, "b (h w) d -> b d h w", h=self.in_grid[0]))
        x = average_pool(rearrange(x, "b d h w -> b (h w) d"), self.in_grid, self.out_grid)
        x = self.stage2(rearrange(x, "b (i j) d -> b d i j", i=self.out_grid[0]))
        return self.readout(rearrange(x, "b d i j -> b (i j) d"))
