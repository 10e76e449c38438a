"""Perceiver resampler (Flamingo, arXiv 2204.14198, section 3.1.1) in the form of Idefics2 (2405.02246)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn
from transformers import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

from prism_deco.projectors.base import PROJECTORS, Projector, square_grid
from prism_deco.projectors.layers import GatedMLP


@PROJECTORS.register("resampler")
class Resampler(Projector):
    """A SwiGLU on every patch, then layers in which learned latents attend to the patches and each other jointly.

    Reference: transformers `idefics2/modeling_idefics2.py` (`Idefics2Connector`), whose layers these are. Its latents
    are initialised to ones, and when trained from scratch they stay identical; here they are drawn, as in Flamingo.

    Args:
        num_tokens: number of visual tokens (latents), a square.
        depth: layers.
        heads: attention heads.
        kv_heads: key and value heads (grouped-query attention).
        head_dim: channels of each head.
        ffn_dim: hidden width of the SwiGLU; None takes 3.5 times the LLM's width, as in Mistral.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_grid: tuple[int, int],
        num_tokens: int | None,
        *,
        depth: int = 3,
        heads: int = 16,
        kv_heads: int = 4,
        head_dim: int = 96,
        ffn_dim: int | None = None,
    ):
        super().__init__(in_dim, out_dim, in_grid, square_grid(num_tokens, in_grid))
        self.input = GatedMLP(in_dim, ffn_dim or 7 * out_dim // 2, out_dim)
        self.body = Idefics2PerceiverResampler(
            Idefics2PerceiverConfig(
                hidden_size=out_dim,
                resampler_n_latents=self.num_tokens,
                resampler_depth=depth,
                resampler_n_heads=heads,
                resampler_head_dim=head_dim,
                num_key_value_heads=kv_heads,
                rms_norm_eps=1e-5,
            )
        )
        nn.init.normal_(self.body.latents)

    def project(self, features: Tensor) -> Tensor:
        """float[B, N, in_dim] -> float[B, M, out_dim]."""
        patches = self.input(features)
        latents = self.body.latents.expand(len(features), -1, -1)
        # The body's own forward requires an attention mask and inspects its values, which synchronises a GPU.
        for layer in self.body.layers:
            latents = layer(latents, patches)
        return self.body.norm(latents)

    def expose_attention(self) -> list[nn.Module]:
        """The attention module of each layer.

        With eager attention, its forward returns (mixed values, probabilities float[B, heads, M, N + M]), where the
        keys are the patches, then the latents.
        """
        return [layer.self_attn for layer in cast("Iterable[Any]", self.body.layers)]
