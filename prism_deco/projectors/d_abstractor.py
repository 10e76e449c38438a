"""D-Abstractor (Honeybee, arXiv 2312.06742, section 3.2): a decoder with deformable attention, one query per token."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from prism_deco.errors import UsageError
from prism_deco.projectors.attention import DeformableAttention, SelfAttention
from prism_deco.projectors.base import PROJECTORS, Projector, square_grid
from prism_deco.projectors.layers import check_init, init_normal, without_autocast
from prism_deco.projectors.windows import average_pool


class DecoderLayer(nn.Module):
    """Self-attention, deformable attention and feed-forward, each with dropout, a residual connection and post-norm."""

    def __init__(
        self,
        dim: int,
        heads: int,
        points: int,
        ffn_dim: int,
        dropout: float,
        grid: tuple[int, int],
        *,
        directional: bool,
        init: str,
    ):
        super().__init__()
        self.self_attention = SelfAttention(dim, heads)
        self.self_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, dim))
        self.ffn_norm = nn.LayerNorm(dim)
        if init == "normal":
            self.apply(init_normal)
        # After `apply`, since it initialises itself.
        self.cross_attention = DeformableAttention(dim, heads, points, grid, directional)
        self.cross_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, memory: Tensor, reference: Tensor) -> Tensor:
        """float[B, M, D], position float[B, M, D], memory float[B, N, D], reference float[1, M, 2] -> the new x."""
        attended, _ = self.self_attention(x, position)
        x = self.self_norm(x + self.dropout(attended))
        attended, _ = self.cross_attention(x + position, memory, reference)
        x = self.cross_norm(x + self.dropout(attended))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


def reference_points(out_grid: tuple[int, int], in_grid: tuple[int, int]) -> Tensor:
    """float[1, M, 2]: initial reference points (x, y) of the queries, from the first patch's centre to the last's.

    They are not the centres of the output cells: Honeybee spreads the points over linspace(0.5, n - 0.5)/n.
    """
    y, x = (torch.linspace(0.5, size - 0.5, out) / size for size, out in zip(in_grid, out_grid, strict=True))
    return rearrange(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1), "i j xy -> 1 (i j) xy")


@PROJECTORS.register("d_abstractor")
class DAbstractor(Projector):
    """Queries start from the pooled features and gather details by deformable attention.

    Runs in the dtype of its weights, even under autocast (the reference keeps it in float32); sampling is in float32 or
    wider. The result has the features' dtype.

    Args:
        depth: decoder layers. DeCo uses 2, Honeybee 6.
        hidden_dim: channels D of the decoder.
        heads: attention heads.
        points: points that each head of a query samples.
        ffn_dim: hidden width of the feed-forward layers.
        dropout: fraction of activations dropped in training.
        query_mode: role of the pooled features. `query`: the queries' position embedding, their content being a learned
            table; `tgt`: the other way round.
        directional_offsets: initialise the offsets to the compass directions, as Deformable DETR (see
            `DeformableAttention`). Honeybee builds on it, but re-initialises all linear layers.
        init: `normal`: N(0, 0.02) and zero biases, as Honeybee's full model; `torch`: torch's default initialisation, a
            query table from N(0, 1), and directional offsets, as Honeybee's module on its own.
    """

    compute_dtype = torch.float32

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_grid: tuple[int, int],
        num_tokens: int | None,
        *,
        depth: int = 2,
        hidden_dim: int = 1024,
        heads: int = 8,
        points: int = 4,
        ffn_dim: int = 1024,
        dropout: float = 0.1,
        query_mode: str = "query",
        directional_offsets: bool = False,
        init: str = "normal",
    ):
        super().__init__(in_dim, out_dim, in_grid, square_grid(num_tokens, in_grid))
        check_init(init)
        if query_mode not in ("query", "tgt"):
            raise UsageError(f"query_mode={query_mode!r} is unknown: choose query or tgt.")
        if depth < 1:
            raise UsageError(f"d_abstractor with depth={depth} has no layers: choose 1 or more.")
        self.pooled_is_content = query_mode == "tgt"
        # As in the reference, equal widths need no projection.
        self.input = nn.Linear(in_dim, hidden_dim) if in_dim != hidden_dim else nn.Identity()
        self.output = nn.Linear(hidden_dim, out_dim) if hidden_dim != out_dim else nn.Identity()
        self.queries = nn.Embedding(self.num_tokens, hidden_dim)
        if init == "normal":
            self.apply(init_normal)
        # Layers come after `apply`, since they initialise themselves.
        directional = directional_offsets or init == "torch"
        self.layers = nn.ModuleList(
            DecoderLayer(hidden_dim, heads, points, ffn_dim, dropout, in_grid, directional=directional, init=init)
            for _ in range(depth)
        )
        self.position = nn.Parameter(torch.empty(1, in_grid[0] * in_grid[1], hidden_dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.reference = nn.Parameter(reference_points(self.out_grid, in_grid))

    def project(self, features: Tensor) -> Tensor:
        """float[B, N, in_dim] -> float[B, M, out_dim]."""
        with without_autocast(features.device):
            memory = self.input(features.to(self.position.dtype)) + self.position
            pooled = average_pool(memory, self.in_grid, self.out_grid)
            learned = self.queries.weight.expand_as(pooled)
            # Which of the two is content and which is the position embedding, see `query_mode`.
            x, position = (pooled, learned) if self.pooled_is_content else (learned, pooled)
            for layer in self.layers:
                x = layer(x, position, memory, self.reference)
            return self.output(x).to(features.dtype)
