"""TokenPacker (arXiv 2407.02392, section 3.2): coarse queries gather details of their region, from several layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from prism_deco.errors import UsageError
from prism_deco.projectors.attention import WindowAttention
from prism_deco.projectors.base import PROJECTORS, Projector, square_grid
from prism_deco.projectors.layers import build_mlp
from prism_deco.projectors.windows import average_pool, bilinear_matrix


@PROJECTORS.register("token_packer")
class TokenPacker(Projector):
    """The last layer's feature map, resized bilinearly, attends to the patches of each token's region; an MLP follows.

    Reference: CircleRadon/TokenPacker `llava/model/multimodal_projector/builder.py`, where keys and values come from
    layers 12, 16, 22 and 23 of CLIP ViT-L and queries from the last of these: `backbone.extra_layers=[11,15,21]` with
    `backbone.layer=-2` (the reference counts the embeddings as layer 0). Regions are the windows of `avgpool`.

    Args:
        extra_layers: the tower's layers whose features precede the last one's; only their number counts.
        heads: attention heads.
        hidden_dim: channels of the attention.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_grid: tuple[int, int],
        num_tokens: int | None,
        *,
        extra_layers: Sequence[int] = (),
        heads: int = 8,
        hidden_dim: int = 1024,
    ):
        super().__init__(in_dim, out_dim, in_grid, square_grid(num_tokens, in_grid))
        layers = len(extra_layers) + 1
        if in_dim % layers:
            raise UsageError(
                f"Features of {in_dim} channels are not those of {layers} layers: leave projector.extra_layers as "
                "backbone.extra_layers."
            )
        # Features of all layers are concatenated, the last layer's at the end.
        self.last = in_dim // layers
        self.query = nn.Sequential(nn.Linear(self.last, hidden_dim, bias=False), nn.LayerNorm(hidden_dim, eps=1e-6))
        self.key = build_mlp(in_dim, hidden_dim, 2).append(nn.LayerNorm(hidden_dim, eps=1e-6))
        self.value = build_mlp(in_dim, hidden_dim, 2).append(nn.LayerNorm(hidden_dim, eps=1e-6))
        self.attention = WindowAttention(hidden_dim, hidden_dim, heads)
        self.readout = build_mlp(hidden_dim, out_dim, 2)
        self.apply(_init)

    def project(self, features: Tensor) -> Tensor:
        """float[B, N, in_dim] -> float[B, M, out_dim]."""
        grids = (self.in_grid, self.out_grid)
        coarse = average_pool(features[..., -self.last :], *grids, bilinear_matrix)
        attended, _ = self.attention(self.query(coarse), self.key(features), self.value(features), grids)
        return self.readout(attended)


def _init(module: nn.Module) -> None:
    """The reference's initialisation: linear layers from N(0, 0.02), zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
