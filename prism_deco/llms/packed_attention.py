"""Attention within each of several records packed into one row, without padding.

`PACKED` is transformers' SDPA attention, restricted to `segments` if a forward pass is given any. Without them
(padded batches, generation) it is SDPA attention unchanged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from prism_deco.errors import UsageError

PACKED = "packed_sdpa"


class Segments(NamedTuple):
    """The records of a row, one after another.

    Attributes:
        lengths: positions of each record.
        bounds: int32[records + 1], the start of each record and the end of the last (`cu_seqlens`).
        longest: the largest length.
    """

    lengths: tuple[int, ...]
    bounds: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> Segments:
        """Segments of these lengths."""
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        return cls(lengths, bounds.to(device, non_blocking=True), max(lengths))


def no_mask(device: torch.device) -> Tensor:
    """bool[1, 1, 1, 1]: a placeholder for rows that need no mask. transformers passes a 4D mask on as it is; without
    one, it would build an L x L mask."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switches a model to `PACKED` permanently, as activation checkpointing recomputes its forward pass later.

    Raises:
        UsageError: the model does not use SDPA.
    """
    used = model.config._attn_implementation
    if used == PACKED:
        return
    if used != "sdpa":
        raise UsageError(f"recipe.packing=true needs llm.attention=sdpa, not {used}.")
    model.set_attn_implementation(PACKED)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface.

    Args:
        query, key, value: float[B, heads, L, head_dim]; B is 1 with `segments`; keys and values may have fewer heads.
        attention_mask: with `segments`, bool[1, 1, L, L] of allowed pairs (those across segments are ignored), or
            `no_mask` for causal attention.

    Returns:
        float[B, L, heads, head_dim], and None for the probabilities.
    """
    if segments is None:
        if attention_mask is not None and attention_mask.shape[-1] == 1 < key.shape[2]:  # `no_mask`, for a packed row
            raise UsageError(f"{type(module).__name__} does not pass on `segments`. Set recipe.packing=false.")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    causal = attention_mask is None or attention_mask.shape[-1] == 1
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings return queries and keys in float32, and autocast does not cover the varlen kernel.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if causal and not dropout and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, segments, scaling), None
    mask = None if causal else attention_mask
    return _one_by_one(query, key, value, mask, segments.lengths, dropout, scaling), None  # type: ignore[call-arg]


@torch.compiler.disable  # it would recompile for the lengths of every batch
def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: tuple[int, ...],
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """One kernel per segment: float[1, L, heads, head_dim]."""
    grouped = query.shape[1] > key.shape[1]
    parts = []
    start = 0
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        end = start + q.shape[2]
        within = None if mask is None else mask[:, :, start:end, start:end]
        out = F.scaled_dot_product_attention(
            q, k, v, within, dropout, is_causal=within is None, scale=scaling, enable_gqa=grouped
        )
        parts.append(out.transpose(1, 2))  # the output projection's input layout, to avoid a copy
        start = end
    return torch.cat(parts, dim=1)


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """One kernel for all segments: float[1, L, heads, head_dim]."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # the oldest supported torch has no `enable_gqa` here
        key = key.repeat_interleave(groups, 1)
        value = value.repeat_interleave(groups, 1)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    # Reading `segments.lengths` would recompile compiled layers for every batch.
    bounds, longest = segments.bounds, segments.longest
    # (-1, 0) is causal: everything to the left, nothing to the right.
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out[None]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
