"""What a checkpoint holds of a run, and how a run takes it up again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from prism_deco.errors import UsageError
from prism_deco.tensors import all_finite
from prism_deco.training.checkpoints import MODEL, Checkpoint
from prism_deco.training.shard_blocks import local_piece
from prism_deco.vlm import VLM

OPTIMIZER = "optimizer."


def model_tensors(vlm: VLM) -> dict[str, Tensor]:
    """The trained parameters, tied ones once, and the buffers that belong to the model's state.

    Frozen weights are left out: they come from where they came from at the start.
    """
    trained: dict[str, Tensor] = {name: p for name, p in vlm.named_parameters() if p.requires_grad}
    # Quantised layers add their quantisation state to the state dict: it belongs to frozen weights, and is no buffer.
    known = {name for name, _ in vlm.named_buffers(remove_duplicate=False)}
    buffers = {
        name: tensor for name, tensor in vlm.state_dict().items() if name in known and not name.startswith("backbone.")
    }
    return trained | buffers


def checkpoint_tensors(vlm: VLM, optimizer: Optimizer) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their names: `model.NAME`, `optimizer.KEY.NAME`."""
    state = {f"{OPTIMIZER}{key}.{name}": tensor for name, key, tensor in _optimizer_state(vlm, optimizer)}
    return {f"{MODEL}{name}": tensor for name, tensor in model_tensors(vlm).items()} | state


@torch.no_grad()
def restore_tensors(checkpoint: Checkpoint, vlm: VLM, optimizer: Optimizer) -> None:
    """Reads this process's part of a checkpoint into the model and its optimizer.

    Raises:
        UsageError: the checkpoint lacks a tensor, or holds one of another shape.
    """
    for name, tensor in model_tensors(vlm).items():
        _fill(checkpoint, f"{MODEL}{name}", tensor)
    trained = {name: p for name, p in vlm.named_parameters() if p.requires_grad}
    for full_name in checkpoint.names(OPTIMIZER):
        key, _, name = full_name.removeprefix(OPTIMIZER).partition(".")
        parameter = trained[name]
        # A state as large as its parameter is divided as it is; others (AdamW's step) are plain numbers.
        if checkpoint.shapes[full_name] == tuple(parameter.shape):
            tensor = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            _fill(checkpoint, full_name, tensor)
        else:
            tensor = checkpoint.read(full_name).to(parameter.device)  # a fused kernel looks for it there
        optimizer.state[parameter][key] = tensor


def _fill(checkpoint: Checkpoint, name: str, tensor: Tensor) -> None:
    if checkpoint.shapes.get(name) != tuple(tensor.shape):
        found = checkpoint.shapes.get(name, "missing")
        raise UsageError(f"{checkpoint.folder} does not fit the model: {name} is {found}, not {tuple(tensor.shape)}.")
    piece = local_piece(tensor)
    if piece.tensor.numel():
        stored = checkpoint.read(name, piece.tensor.shape, piece.offset)
        if not all_finite(stored):
            raise UsageError(
                f"{checkpoint.folder}: {name} holds NaN or infinite numbers. Remove this checkpoint's folder: "
                "training then continues from an earlier one, or from the start."
            )
        piece.tensor.copy_(stored)


def _optimizer_state(vlm: VLM, optimizer: Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    names = {id(parameter): name for name, parameter in vlm.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            yield names[id(parameter)], key, value


def scheduler_content(scheduler: Any, optimizer: Optimizer) -> dict[str, Any]:
    """The learning-rate schedule as JSON."""
    return {"scheduler": scheduler.state_dict(), "lr": [group["lr"] for group in optimizer.param_groups]}


def restore_scheduler(content: dict[str, Any], scheduler: Any, optimizer: Optimizer) -> None:
    """Takes up what `scheduler_content` made."""
    scheduler.load_state_dict(content["scheduler"])
    for group, rate in zip(optimizer.param_groups, content["lr"], strict=True):
        group["lr"] = rate
