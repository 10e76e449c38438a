"""Measures the time and memory of a block of code."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass
class Usage:
    """The time and memory of a block of code.

    Attributes:
        seconds: wall-clock time; on CUDA until the device is done.
        cpu_seconds: CPU time of this process, all threads.
        peak: peak bytes above those held at the start, in CUDA's allocator or in the process' resident memory; None if
            it was not measured, or the system is not Linux.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak: int | None = None

    @classmethod
    def total(cls, usages: Sequence[Usage]) -> Usage:
        """Of several blocks in sequence: summed times and the highest peak."""
        peaks = [usage.peak for usage in usages if usage.peak is not None]
        seconds = sum(usage.seconds for usage in usages)
        return cls(seconds, sum(usage.cpu_seconds for usage in usages), max(peaks, default=None))


@contextmanager
def usage(device: torch.device, *, memory: bool = False) -> Iterator[Usage]:
    """Measures the block inside it; the result is complete when the block ends."""
    result = Usage()
    _wait(device)  # earlier kernels are not part of the block
    before = _start_peak(device) if memory else None
    start, cpu_start = time.perf_counter(), time.process_time()
    yield result
    _wait(device)
    result.seconds, result.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    if before is not None:
        result.peak = _peak(device) - before


def activation_bytes(module: nn.Module, features: Tensor) -> int:
    """Bytes that autograd saves in a forward pass, without the weights and the module's input."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (features, *module.parameters())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Saved tensors can be views of one storage, which counts once.
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # Until `output` goes, the graph keeps all saved tensors, so no address is used twice.
        output = module(features)
    del output
    return sum(kept.values())


def _start_peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc keeps small freed blocks, whose reuse would not show as growth
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
