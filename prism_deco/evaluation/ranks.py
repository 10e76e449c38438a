"""The processes that share an evaluation: those of torchrun, or those that training has left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from prism_deco.errors import UsageError

# A rank that has answered all its questions waits for the slowest one; torchrun ends all of them if one fails.
_PATIENCE = timedelta(days=7)


_meeting: Any = None


@contextmanager
def process_group() -> Iterator[bool]:
    """Joins the processes that torchrun started, or those that training has joined already.

    Yields:
        Whether this is the first of them, or the only one.
    """
    global _meeting
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("gloo", timeout=_PATIENCE)  # the ranks exchange files and wait for each other
    elif dist.is_initialized():
        # Training's own group gives up after minutes, and a GPU's would keep it busy with waiting.
        _meeting = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield not dist.is_initialized() or dist.get_rank() == 0
    finally:
        if joins:
            dist.destroy_process_group()
        elif _meeting is not None:
            dist.destroy_process_group(_meeting)
            _meeting = None


def meet() -> None:
    """Returns when all processes of `process_group` have come here."""
    if dist.is_initialized():
        dist.barrier(group=_meeting)


def local_device(kind: str) -> torch.device:
    """This process's own device of a kind: one of torch's, or what `trainer.accelerator` says (auto | cpu | gpu).

    "cuda", "gpu" and "auto" are this process's own GPU, and the CPU where there is none.
    """
    if kind not in ("cuda", "gpu", "auto"):
        return _named(kind)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def asked_device(name: str) -> torch.device:
    """This process's own device of a name that somebody gave: unlike `local_device`, it never takes another instead.

    Raises:
        UsageError: there is no such device, or not on this machine.
    """
    device = _named("cuda" if name == "gpu" else name) if name != "auto" else local_device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (device.index or 0):
            found = f"there are {count}" if count else "this machine has no GPU that torch can use"
            raise UsageError(f"device {name}: {found}. Choose another, for example cpu.")
        return device if device.index is not None else local_device("cuda")
    try:
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name} cannot be used ({str(error).splitlines()[0]}): choose cpu or cuda.") from error
    return device


def _named(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is no device: choose cpu, cuda, or cuda:N for one of several GPUs.") from error
