"""Finds the first non-finite value behind a non-finite loss or gradient, and the records concerned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from prism_deco.distributed import gather_objects
from prism_deco.sequence import Batch
from prism_deco.training.sharding import local_piece
from prism_deco.vlm import VLM


@torch.no_grad()
def diagnose(vlm: VLM, batches: Sequence[Batch]) -> str:
    """Repeats the forward passes of a bad step and names the first module whose output is not finite, or else the
    parameter whose gradient went bad first, with the records concerned.

    A value that goes bad between two modules, for example in attention, is attributed to the next module. All processes
    must call this with their own batches, before the gradients are clipped.
    """
    where, records = None, []
    for batch in batches:
        if bad := _first_bad_output(vlm, batch):
            records += batch.ids
            where = where or bad
    gradient = None if where else _first_bad_gradient(vlm)
    everything = [name for batch in batches for name in batch.ids]
    findings = gather_objects((where, gradient, records, everything))
    for rank, (where, _, records, _) in enumerate(findings):
        if where:
            return f"{where}, records {_listed(records)} (rank {rank})"
    gradients = [gradient for _, gradient, _, _ in findings if gradient]
    where = (
        f"the loss is finite, the gradient of {gradients[0]} is not" if gradients else "only the sums are not finite"
    )
    return f"{where}, records {_listed([name for *_, names in findings for name in names])}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _first_bad_output(vlm: nn.Module, batch: Batch) -> str | None:
    """Where the forward pass of a batch first produces a value that is not finite; None if the loss is finite."""
    names = {module: name or "the model" for name, module in vlm.named_modules()}
    found: list[str] = []

    def check(module: nn.Module, inputs: Any, output: Any) -> None:
        # Inner modules finish before the ones that contain them.
        if not found and module in names and not _is_finite(output):
            found.append(names[module])

    # Compiled layers would skip the hooks of the modules inside them.
    with torch.compiler.set_stance("force_eager"), register_module_forward_hook(check):
        loss = vlm(batch).total
    if loss.isfinite():
        return None
    return f"first in the output of {found[0]}" if found else "in the loss itself"


def _is_finite(values: Any) -> bool:
    return all(
        bool(value.isfinite().all())
        for value in tree_leaves(values)
        if isinstance(value, Tensor) and value.is_floating_point()
    )


def _first_bad_gradient(vlm: nn.Module) -> str | None:
    """The last parameter, in module order, whose gradient is not finite: gradients flow backwards."""
    bad = [
        name
        for name, parameter in vlm.named_parameters()
        if parameter.grad is not None and not local_piece(parameter.grad).tensor.isfinite().all()
    ]
    return bad[-1] if bad else None
