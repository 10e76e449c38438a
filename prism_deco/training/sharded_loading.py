"""Fills a model that was built without weights, each process its own part, straight from the files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from prism_deco.errors import UsageError
from prism_deco.llms.build import added_rows
from prism_deco.llms.layers import fill_buffers
from prism_deco.llms.lora import base_name, draw_lora, is_adapter
from prism_deco.training.shard_blocks import Piece, local_piece

log = logging.getLogger(__name__)


@torch.no_grad()
def read_weights(lm: PreTrainedModel, files: Mapping[str, Path], device: torch.device) -> None:
    """Gives an LLM on the meta device, sharded or not, the weights of safetensors files.

    No process has more of the model in memory than its own part and one row block of a file.

    Args:
        files: the file of each tensor.

    Raises:
        UsageError: a weight is missing, or has another shape.
    """
    fill_buffers(lm)
    buffers = {name: buffer.clone() for name, buffer in lm.named_buffers()}
    lm.to_empty(device=device)
    lm.tie_weights()  # the copies that `to_empty` makes are separate
    for name, buffer in lm.named_buffers():
        buffer.copy_(buffers[name])
    handles: dict[Path, Any] = {}
    for adapted, parameter in lm.named_parameters():
        if is_adapter(adapted):
            _draw(adapted, local_piece(parameter))
            continue
        name = base_name(adapted)
        if name not in files:
            raise UsageError(f"The language model's files lack the weight {name}.")
        file = handles.setdefault(files[name], safe_open(files[name], "pt"))
        _read(name, file.get_slice(name), local_piece(parameter), lm.config.initializer_range)


def _read(name: str, stored: Any, piece: Piece, std: float) -> None:
    shape = tuple(stored.get_shape())
    added = piece.shape[0] - shape[0]
    # Tables have a row per token, and so has the head's bias: the tokenizer may need more of them or fewer.
    by_token = "embed" in name or "lm_head" in name
    if shape[1:] != piece.shape[1:] or (added and not by_token):
        raise UsageError(f"The weight {name} is {list(shape)} in its file and {list(piece.shape)} in the model.")
    if not piece.tensor.numel():
        return
    start, rows = piece.offset[0], piece.tensor.shape[0]
    there = max(0, min(rows, shape[0] - start))
    if there:
        piece.tensor[:there].copy_(stored[start : start + there])
    if there < rows and len(shape) == 1:
        piece.tensor[there:].zero_()
    elif there < rows:
        piece.tensor[there:].copy_(added_rows(added, piece.shape[1], std)[start + there - shape[0] :][: rows - there])


def _draw(name: str, piece: Piece) -> None:
    start = piece.offset[0]
    piece.tensor.copy_(draw_lora(name, piece.shape)[start : start + piece.tensor.shape[0]])
