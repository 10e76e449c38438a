"""Q-Former (BLIP-2, arXiv 2301.12597, section 3.1) cut to its first layers, as in DeCo's comparison."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from prism_deco.errors import UsageError
from prism_deco.projectors.base import PROJECTORS, Projector, square_grid
from prism_deco.projectors.layers import build_mlp, check_init, init_normal
from prism_deco.projectors.qformer_weights import load_qformer


@PROJECTORS.register("qformer")
class QFormer(Projector):
    """Learned queries that attend to each other and, in every second layer, to the patches.

    Layers are post-norm BERT layers: self-attention, cross-attention (layers 0, 2, ..), feed-forward. The default of
    two layers has a single cross-attention.

    Args:
        num_tokens: number of visual tokens (queries), a square.
        depth: layers.
        hidden_dim: width of the queries; None takes the LLM's.
        heads: attention heads.
        ffn_dim: hidden width of the feed-forward layers; None takes four times `hidden_dim`.
        dropout: fraction of activations and attention probabilities dropped in training.
        readout_depth: linear layers between the queries and the LLM.
        input_dim: output width of a linear layer on the patches; None: no such layer.
        query_std: standard deviation of the queries' initialisation.
        init: initialisation of the linear layers before and after the Q-Former: `torch` (torch's default) or `normal`
            (N(0, 0.02) and zero biases, which the Q-Former's own layers always have).
        weights: a BLIP-2 checkpoint of LAVIS or transformers (file or folder) to start from. Its layer norm on the
            patches (`ln_vision`) then becomes this module's `input_norm`. Not read on the meta device.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_grid: tuple[int, int],
        num_tokens: int | None,
        *,
        depth: int = 2,
        hidden_dim: int | None = 768,
        heads: int = 12,
        ffn_dim: int | None = 3072,
        dropout: float = 0.1,
        readout_depth: int = 1,
        input_dim: int | None = None,
        query_std: float = 0.02,
        init: str = "torch",
        weights: str | None = None,
    ):
        super().__init__(in_dim, out_dim, in_grid, square_grid(num_tokens, in_grid))
        if depth < 1:
            raise UsageError(f"qformer with depth={depth} has no layers: choose 1 or more.")
        check_init(init)
        hidden_dim = hidden_dim or out_dim
        patch_dim = input_dim or in_dim
        self.queries = nn.Parameter(torch.empty(1, self.num_tokens, hidden_dim))
        nn.init.normal_(self.queries, std=query_std)
        self.input = nn.Linear(in_dim, input_dim) if input_dim else nn.Identity()
        self.input_norm = nn.LayerNorm(patch_dim) if weights else nn.Identity()
        self.body = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=hidden_dim,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                intermediate_size=ffn_dim or 4 * hidden_dim,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
                cross_attention_frequency=2,
                encoder_hidden_size=patch_dim,
            )
        )
        self.readout = build_mlp(hidden_dim, out_dim, readout_depth)
        if init == "normal":
            self.input.apply(init_normal)
            self.readout.apply(init_normal)
        if weights and not self.queries.is_meta:
            load_qformer(self, Path(weights))

    def project(self, features: Tensor) -> Tensor:
        """float[B, N, in_dim] -> float[B, M, out_dim]."""
        patches = self.input_norm(self.input(features))
        queries = self.queries.expand(len(features), -1, -1)
        return self.readout(self.body(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state)

    def expose_attention(self) -> list[tuple[str, nn.Module]]:
        """Switches to attention that returns its probabilities, for forward hooks to read.

        Returns:
            ("self" | "cross", module) in the order of computation. Each module's forward returns
            (mixed values, probabilities float[B, heads, M, M or N]), both nodes of the autograd graph.
        """
        self.body.set_attn_implementation("eager")  # the fused kernels return no probabilities
        modules: list[tuple[str, nn.Module]] = []
        for layer in cast("Iterable[Any]", self.body.encoder.layer):
            modules.append(("self", layer.attention.attention))
            if layer.has_cross_attention:
                modules.append(("cross", layer.crossattention.attention))
        return modules
