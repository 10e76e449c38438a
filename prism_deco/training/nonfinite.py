"""Losses and gradients that are not finite: what went bad first, and in which records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prism_deco.sequence import Batch
from prism_deco.training.shard_blocks import local_piece
from prism_deco.vlm import VLM


@torch.no_grad()
def diagnose(vlm: VLM, batches: Sequence[Batch]) -> str:
    """Runs the forward passes of a bad step once more and names the first module whose output is not finite, else the
    parameter whose gradient went bad first, with the records concerned.

    What goes bad between two modules, in attention say, is seen in the output of the next one. All processes must
    call it, with their own batches, before the gradients are clipped.
    """
    module, records = None, []
    for batch in batches:
        with _first_bad_output(vlm) as found:
            loss = vlm(batch).total
        if not loss.isfinite():
            records += batch.ids
            module = module or next(iter(found), None)
    gradient = None if module else _first_bad_gradient(vlm)
    everything = [name for batch in batches for name in batch.ids]
    findings: list[Any] = [(module, gradient, records, everything)]
    if dist.is_initialized():
        findings = [None] * dist.get_world_size()
        dist.all_gather_object(findings, (module, gradient, records, everything))
    return _sentence(findings)


def _sentence(findings: list[tuple[str | None, str | None, list[str], list[str]]]) -> str:
    for rank, (module, _, records, _) in enumerate(findings):
        if records:
            where = f"first in the output of {module}" if module else "in the loss itself"
            return f"{where}, records {_listed(records)} (rank {rank})"
    gradient = next((gradient for _, gradient, _, _ in findings if gradient), None)
    where = f"the loss is finite, the gradient of {gradient} is not" if gradient else "only the sums are not finite"
    return f"{where}, records {_listed([name for *_, names in findings for name in names])}"


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:8])}{f' and {len(names) - 8} more' * (len(names) > 8)}"


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
