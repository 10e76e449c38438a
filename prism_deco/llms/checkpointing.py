"""Activation checkpointing: memory for computation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from prism_deco.config.registry import unknown
from prism_deco.config.schema import ACTIVATION_CHECKPOINTING

# What `selective` keeps: the results that are expensive to compute and cheap to hold.
_KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def checkpoint_activations(lm: PreTrainedModel, policy: str) -> None:
    """Trades memory for computation in every layer of the LLM.

    Args:
        policy: none | selective (matrix products and attention are kept, the rest is recomputed) | full (a layer's
            input is kept, all else is recomputed; prismatic-vlms).
    """
    if policy not in ACTIVATION_CHECKPOINTING:
        raise unknown("trainer.activation_checkpointing", policy, ACTIVATION_CHECKPOINTING)
    if policy == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _KEPT)
    # The first is the newer name of the second.
    enable: Callable[[dict[str, Any]], None] = getattr(
        lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable
    )
    enable(options)
