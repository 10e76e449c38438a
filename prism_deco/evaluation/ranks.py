"""The processes that share an evaluation: those of torchrun, or those that training has left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

# A rank that has answered all its questions waits for the slowest one; torchrun ends all of them if one fails.
_PATIENCE = timedelta(days=7)


@contextmanager
def process_group() -> Iterator[bool]:
    """Joins the processes that torchrun started, where it did and training has not joined them already.

    Yields:
        Whether this is the first of them, or the only one.
    """
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("gloo", timeout=_PATIENCE)  # the ranks exchange files and wait for each other
    try:
        yield not dist.is_initialized() or dist.get_rank() == 0
    finally:
        if joins:
            dist.destroy_process_group()


def local_device(kind: str) -> torch.device:
    """This process's own device of a kind: one of torch's, or what `trainer.accelerator` says (auto | cpu | gpu).

    "cuda", "gpu" and "auto" are this process's own GPU, and the CPU where there is none.
    """
    if kind not in ("cuda", "gpu", "auto"):
        return torch.device(kind)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
