"""Losses and gradients that are not finite: what went bad first, and in which records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prism_deco.distributed import gather_objects
from prism_deco.sequence import Batch
from prism_deco.training.sharding import local_piece
from prism_deco.vlm import VLM


@torch.no_grad()
def diagnose(vlm: VLM, batches: Sequence[Batch]) -> str:
    """Runs the forward passes of a bad step once more and names the first module whose output is not finite, else the
    parameter whose gradient went bad first, with the records concerned.

    What goes bad between two modules, in attention for example, shows in the output of the next one. All processes must
    call it, with their own batches, before the gradients are clipped.
    """
    where, records = None, []
    for batch in batches:
        # Compiled layers would run past the hooks within them.
        with torch.compiler.set_stance("force_eager"), _first_bad_output(vlm) as found:
            loss = vlm(batch).total
        if not loss.isfinite():
            records += batch.ids
            where = where or (f"first in the output of {found[0]}" if found else "in the loss itself")
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


@contextmanager
def _first_bad_output(vlm: nn.Module) -> Iterator[list[str]]:
    """Collects modules whose output is not finite, in the order in which they finish: inner ones come first."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _is_finite(output):
                found.append(name)

        return check

    handles = [module.register_forward_hook(hook(name or "the model")) for name, module in vlm.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(values: Any) -> bool:
    return all(
        bool(value.isfinite().all())
        for value in tree_leaves(values)
        if isinstance(value, Tensor) and value.is_floating_point()
    )


def _first_bad_gradient(vlm: nn.Module) -> str | None:
    """The last parameter, in the order of the modules, whose gradient is not finite: gradients flow backwards."""
    bad = [
        name
        for name, parameter in vlm.named_parameters()
        if parameter.grad is not None and not local_piece(parameter.grad).tensor.isfinite().all()
    ]
    return bad[-1] if bad else None
