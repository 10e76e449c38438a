"""FastV (arXiv 2403.06764): drops the visual tokens that an early layer of the LLM attends to least."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prism_deco.errors import UsageError
from prism_deco.evaluation.compressors.base import COMPRESSORS, take
from prism_deco.llms.layers import decoder_layers
from prism_deco.sequence import Batch
from prism_deco.vlm import VLM


@COMPRESSORS.register("fastv")
class FastV:
    """Ranks visual tokens by the attention of the prompt's last position in one layer, averaged over heads, and keeps
    only the top ones in all later layers: `num_tokens` per image, ranked over all images of a prompt together. Tokens
    that remain keep their position ids.

    Reference: pkunlp-icler/FastV `src/transformers/src/transformers/models/llama/modeling_llama.py` (`FASTV_INPLACE`),
    which takes one prompt at a time. Here each row of a batch drops its own tokens, also from the keys and values that
    the tokens of the answer attend to. The layers up to `layer` read all visual tokens.

    Args:
        vlm: changed in place. Prompts end at the last position (they are padded on the left).
        num_tokens: visual tokens to keep per image.
        layer: the layer whose attention ranks, counted from 1; the paper's is 2.
    """

    note = "fastv: the layers up to `layer` read all visual tokens, later ones as many as the table says."
    """Printed under a table of scores."""

    def __init__(self, vlm: VLM, num_tokens: int, *, layer: int = 2):
        layers = list(decoder_layers(vlm.lm))
        settings: Any = vlm.lm.config
        if type(layer) is not int or not 1 <= layer < len(layers):
            raise UsageError(f"compressor.layer={layer} must be a whole number from 1 to {len(layers) - 1}.")
        kinds = set(getattr(settings, "layer_types", None) or ["full_attention"])
        attention: Any = getattr(layers[layer - 1], "self_attn", None)
        if kinds != {"full_attention"} or settings._attn_implementation.startswith("flash") or attention is None:
            raise UsageError(
                f"compressor=fastv needs an LLM with full attention in every layer, computed by llm.attention=sdpa or "
                f"eager; {type(vlm.lm).__name__} has {', '.join(sorted(kinds))} by {settings._attn_implementation}."
            )
        # Of transformers' implementations, only eager attention returns probabilities. The copy leaves the other
        # layers, which share the config, as they are.
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation = "eager"
        self.num_tokens = num_tokens
        self._per_image = vlm.projector.num_tokens
        self._first = layers[layer]
        self._visual = self._kept = self._valid = torch.empty(0)
        self._keys = 0
        embed = vlm.embed

        # The layers' hooks do not see the batch. Every prompt passes through `embed`, so it keeps the visual positions.
        def seen(batch: Batch, visual: Tensor | None = None) -> Tensor:
            self._visual = batch.visual
            return embed(batch, visual)

        vlm.embed = seen
        layers[layer - 1].register_forward_pre_hook(self._mask_for_eager, with_kwargs=True)
        attention.register_forward_hook(self._rank)
        for later in layers[layer:]:
            later.register_forward_pre_hook(self._drop, with_kwargs=True)

    def _mask_for_eager(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Converts the ranking layer's mask to the additive one that eager attention takes."""
        mask, hidden = kwargs["attention_mask"], args[0]
        if mask is not None or hidden.shape[1] > 1:
            mask = _additive(_allowed(mask, hidden, hidden.shape[1]), hidden.dtype)
        return args, kwargs | {"attention_mask": mask}

    def _rank(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        """Chooses the positions of a prompt to keep, int64[B, K], and bool[B, K], False where a row has fewer."""
        attention = output[1]
        self._keys = attention.shape[-1]  # of the prompt and the answer so far
        if attention.shape[2] == 1:
            return  # not the prompt but a token of the answer
        # The last position's attention, averaged over heads: [B, H, n, n] -> [B, n].
        scores = attention[:, :, -1].float().mean(dim=1)
        keep = ~self._visual
        for row, own in enumerate(self._visual):
            places = own.nonzero()[:, 0]
            # The tokens to keep of all images of this prompt together.
            number = len(places) // self._per_image * self.num_tokens
            keep[row, places[scores[row, places].topk(number).indices]] = True
        # A stable sort moves the kept positions to the end without changing their order.
        # Rows that keep fewer positions are filled up with dropped ones, which `_valid` masks.
        self._kept = keep.int().argsort(dim=1, stable=True)[:, -int(keep.sum(dim=1).max()) :]
        self._valid = keep.gather(1, self._kept)

    def _drop(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Restricts a layer to the kept positions of a prompt, and to their keys for the tokens that follow it."""
        hidden, mask = args[0], kwargs["attention_mask"]
        length = self._visual.shape[1]  # of the prompts, before any position is dropped
        kept, valid = self._kept, self._valid
        if hidden.shape[1] > 1:
            # Later layers get the hidden states of the layer before, which are shorter already; their mask and position
            # embeddings are always those of the full prompt.
            hidden = take(hidden, kept) if module is self._first else hidden
            cos_and_sin = (part.expand(len(kept), -1, -1) for part in kwargs["position_embeddings"])
            kwargs = kwargs | {"position_embeddings": tuple(take(part, kept) for part in cos_and_sin)}
            allowed = take(_allowed(mask, hidden, length)[:, 0], kept)
        else:
            # Keys in these layers' cache: what was kept of the prompt, and all tokens of the answer so far.
            answered = torch.arange(length, self._keys, device=kept.device).expand(len(kept), -1)
            kept, valid = torch.cat([kept, answered], dim=1), F.pad(valid, (0, answered.shape[1]), value=True)
            allowed = _allowed(mask, hidden, self._keys)[:, 0]
        # The rows are the queries' already; this chooses the columns, the keys.
        allowed = take(allowed.mT, kept).mT & valid[:, None]
        return (hidden, *args[1:]), kwargs | {"attention_mask": _additive(allowed[:, None], hidden.dtype)}


def _allowed(mask: Tensor | None, hidden: Tensor, keys: int) -> Tensor:
    """bool[B, 1, queries, keys] from a mask of transformers, which is bool, additive, or None if causal.

    Args:
        hidden: float[B, n, E]; n is 1 for a token of the answer.
    """
    rows = len(hidden)
    if mask is None:
        queries = 1 if hidden.shape[1] == 1 else keys
        return hidden.new_ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(rows, 1, -1, -1)
    return (mask if mask.dtype == torch.bool else mask == 0).expand(rows, 1, -1, -1)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, the lowest finite number elsewhere: -inf would make rows of padding, all masked, NaN."""
    least = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)  # eager attention's softmax is in float32
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, least)
