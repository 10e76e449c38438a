"""Access to the layers, activations and buffers of any causal LM of transformers, independent of attribute names."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from prism_deco.config.registry import unknown
from prism_deco.config.schema import ACTIVATION_CHECKPOINTING
from prism_deco.errors import UsageError

# Operators whose results `selective` keeps: expensive to compute, cheap to hold.
_KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def decoder_layers(lm: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal LM, in order; `UsageError` if it has no list of them."""
    depth = cast(Any, lm).config.num_hidden_layers
    for module in lm.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth > 0:
            return module
    raise UsageError(f"{type(lm).__name__} has no list of {depth} decoder layers, so it cannot be sharded or planned.")


def decoder(lm: PreTrainedModel) -> nn.Module:
    """A causal LM without its head."""
    if lm.base_model is not lm:
        return lm.base_model
    # Llama 4's `base_model_prefix` does not name its decoder.
    table = lm.get_input_embeddings()
    return next(part for part in lm.children() if any(module is table for module in part.modules()))


def checkpoint_activations(lm: PreTrainedModel | None, policy: str, blocks: Iterable[nn.Module] = ()) -> None:
    """Trades computation for memory in every layer of the LLM.

    Args:
        policy: none | selective (keep matrix products and attention, recompute the rest) | full (keep the input of
            each layer and recompute everything else, as prismatic-vlms does).
        blocks: blocks of a trained tower, to treat alike.
    """
    if policy not in ACTIVATION_CHECKPOINTING:
        raise unknown("trainer.activation_checkpointing", policy, ACTIVATION_CHECKPOINTING)
    if policy == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _KEPT)
    if lm is not None:
        lm.activation_checkpointing_enable(options)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, **options)


def fill_buffers(lm: PreTrainedModel) -> None:
    """Computes, on the CPU, the buffers that checkpoints lack (rotary frequencies, position numbers).

    For a model built on the meta device and then given its weights. As in `from_pretrained`, transformers'
    `initialize_weights` fills whatever is not marked as initialised; nothing random is drawn.
    """
    for tensor in chain(lm.parameters(), lm.buffers()):
        tensor._is_hf_initialized = not tensor.is_meta  # type: ignore[attr-defined]
    for module in lm.modules():
        empty = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        module._is_hf_initialized = not empty  # type: ignore[assignment]
        for name in empty:
            setattr(module, name, torch.empty_like(module.get_buffer(name), device="cpu"))
    lm.initialize_weights()
