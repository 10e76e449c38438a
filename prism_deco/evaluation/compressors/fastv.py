"""FastV (arXiv 2403.06764): the LLM goes on without the visual tokens that an early layer attends to least."""

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
    """Ranks visual tokens by the attention that the prompt's last position pays to them in a layer, averaged over
    heads, and drops all but the first `num_tokens` per image from the layers behind it. Others keep their positions.

    Reference: pkunlp-icler/FastV `src/transformers/src/transformers/models/llama/modeling_llama.py` (`FASTV_INPLACE`),
    for one prompt at a time; here rows of a batch are dropped from one by one, and the keys and values that answers are
    generated with are dropped as well. The layers up to `layer` read all visual tokens.

    Args:
        vlm: changed in place. Prompts end at the last position (they are padded on the left).
        num_tokens: visual tokens left of an image.
        layer: the layer whose attention ranks, counted from 1; the paper's is 2.
    """

    note = "fastv: the layers up to `layer` read all visual tokens, those behind it as many as the table says."
    """What a table of scores must say of it."""

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
        # Only the plain attention of transformers returns probabilities.
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation = "eager"
        self.num_tokens = num_tokens
        self._per_image = vlm.projector.num_tokens
        self._first = layers[layer]
        self._visual = self._kept = self._valid = torch.empty(0)
        self._keys = 0
        embed = vlm.embed

        def seen(batch: Batch, visual: Tensor | None = None) -> Tensor:
            self._visual = batch.visual
            return embed(batch, visual)

        vlm.embed = seen
        layers[layer - 1].register_forward_pre_hook(self._additive, with_kwargs=True)
        attention.register_forward_hook(self._rank)
        for later in layers[layer:]:
            later.register_forward_pre_hook(self._drop, with_kwargs=True)

    def _additive(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Gives the ranking layer its mask in the form that plain attention takes."""
        mask, hidden = kwargs["attention_mask"], args[0]
        if mask is not None or hidden.shape[1] > 1:
            mask = _additive(_allowed(mask, hidden, hidden.shape[1]), hidden.dtype)
        return args, kwargs | {"attention_mask": mask}

    def _rank(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        """Chooses what is kept of a prompt: int64[B, K], its positions, and bool[B, K], False where a row has fewer."""
        attention = output[1]
        self._keys = attention.shape[-1]
        if attention.shape[2] == 1:
            return  # a further token of the answer
        scores = attention[:, :, -1].float().mean(dim=1)
        keep = ~self._visual
        for row, own in enumerate(self._visual):
            places = own.nonzero()[:, 0]
            number = len(places) // self._per_image * self.num_tokens
            keep[row, places[scores[row, places].topk(number).indices]] = True
        self._kept = keep.int().argsort(dim=1, stable=True)[:, -int(keep.sum(dim=1).max()) :]
        self._valid = keep.gather(1, self._kept)

    def _drop(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Takes what a layer reads of a prompt from the kept positions, and their keys for what follows it."""
        hidden, mask, length = args[0], kwargs["attention_mask"], self._visual.shape[1]
        kept, valid = self._kept, self._valid
        if hidden.shape[1] > 1:
            hidden = take(hidden, kept) if module is self._first else hidden
            cos_and_sin = (part.expand(len(kept), -1, -1) for part in kwargs["position_embeddings"])
            kwargs = kwargs | {"position_embeddings": tuple(take(part, kept) for part in cos_and_sin)}
            allowed = take(_allowed(mask, hidden, length)[:, 0], kept)
        else:
            answered = torch.arange(length, self._keys, device=kept.device).expand(len(kept), -1)
            kept, valid = torch.cat([kept, answered], dim=1), F.pad(valid, (0, answered.shape[1]), value=True)
            allowed = _allowed(mask, hidden, self._keys)[:, 0]
        allowed = take(allowed.mT, kept).mT & valid[:, None]
        return (hidden, *args[1:]), kwargs | {"attention_mask": _additive(allowed[:, None], hidden.dtype)}


def _allowed(mask: Tensor | None, hidden: Tensor, keys: int) -> Tensor:
    """bool[B, 1, queries, keys] of a mask as transformers passes it on: bool, additive, or None where it is causal.

    Args:
        hidden: float[B, n, E]: as many queries as positions n, or as keys in a prompt.
    """
    rows = len(hidden)
    if mask is None:
        queries = 1 if hidden.shape[1] == 1 else keys
        return hidden.new_ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(rows, 1, -1, -1)
    return (mask if mask.dtype == torch.bool else mask == 0).expand(rows, 1, -1, -1)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, the least number elsewhere: rows of padding, which may see nothing, must not become NaN."""
    least = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)  # transformers' softmax is in float32
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, least)
