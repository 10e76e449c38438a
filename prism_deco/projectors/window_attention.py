"""Attention pooling of windows with the window's mean as the query: Molmo (arXiv 2409.17146, section 2) and Molmo2."""

from __future__ import annotations

from torch import Tensor

from prism_deco.projectors.attention import WindowAttention
from prism_deco.projectors.base import PROJECTORS, Projector, square_grid
from prism_deco.projectors.layers import GatedMLP
from prism_deco.projectors.windows import average_pool


@PROJECTORS.register("window_attention")
class MeanQueryPooling(Projector):
    """A window's mean attends to the patches of the window; a SwiGLU follows.

    References: allenai/molmo2 `olmo/nn/vision_backbone.py` (`attention_meanq`) and transformers
    `molmo2/modeling_molmo2.py` (`Molmo2Adapter`). Molmo2 feeds it the concatenated features of two layers of the tower:
    `backbone.layer=24 backbone.extra_layers=[18]`. Windows are those of `avgpool`.

    Args:
        heads: attention heads.
        hidden_dim: channels of the attention and of its output; Molmo2 takes its tower's width.
        ffn_dim: hidden width of the SwiGLU; None takes three times the LLM's width.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_grid: tuple[int, int],
        num_tokens: int | None,
        *,
        heads: int = 16,
        hidden_dim: int = 1152,
        ffn_dim: int | None = None,
    ):
        super().__init__(in_dim, out_dim, in_grid, square_grid(num_tokens, in_grid))
        self.attention = WindowAttention(in_dim, hidden_dim, heads)
        self.readout = GatedMLP(hidden_dim, ffn_dim or 3 * out_dim, out_dim)

    def project(self, features: Tensor) -> Tensor:
        """float[B, N, in_dim] -> float[B, M, out_dim]."""
        grids = (self.in_grid, self.out_grid)
        attended, _ = self.attention(average_pool(features, *grids), features, features, grids)
        return self.readout(attended)
