"""What a model of transformers lacks when it was built on the meta device and then given its weights."""

from __future__ import annotations

from itertools import chain

import torch
from transformers import PreTrainedModel


def fill_buffers(model: PreTrainedModel) -> None:
    """Computes, on the CPU, the buffers that no file holds (rotary frequencies, position numbers).

    As `from_pretrained` does it: transformers' own `initialize_weights` fills what is not marked as initialised.
    Nothing random is drawn.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        tensor._is_hf_initialized = not tensor.is_meta  # type: ignore[attr-defined]
    for module in model.modules():
        hollow = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        module._is_hf_initialized = not hollow  # type: ignore[assignment]
        for name in hollow:
            setattr(module, name, torch.empty_like(module.get_buffer(name), device="cpu"))
    model.initialize_weights()
