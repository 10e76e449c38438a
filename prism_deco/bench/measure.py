"""Time, arithmetic and memory of one forward and backward pass of a module whose input needs no gradient."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


def step(module: nn.Module, features: Tensor) -> None:
    """A forward pass, and a backward pass from the sum of its output; old gradients are dropped first."""
    module.zero_grad(set_to_none=True)
    module(features).sum().backward()


def step_seconds(module: nn.Module, features: Tensor) -> float:
    """Wall-clock time of a step, seconds; on CUDA until the device is done."""
    _wait(features.device)
    start = time.perf_counter()
    step(module, features)
    _wait(features.device)
    return time.perf_counter() - start


def memory_kind(device: torch.device | str) -> str:
    """What `step_memory` counts on this device."""
    if torch.device(device).type == "cuda":
        return "peak of the CUDA allocator above weights and input"
    return "activations kept for the backward pass"


def step_memory(module: nn.Module, features: Tensor) -> int:
    """Bytes as `memory_kind` says."""
    if features.device.type == "cuda":
        module.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats(features.device)
        before = torch.cuda.memory_allocated(features.device)
        step(module, features)
        _wait(features.device)
        return torch.cuda.max_memory_allocated(features.device) - before
    owned = {tensor.untyped_storage().data_ptr() for tensor in (features, *module.parameters())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Several saved tensors can be views of one storage: the graph keeps it alive once.
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = module(features)
    del output
    return sum(kept.values())


@dataclass
class Usage:
    """What a stretch of code took.

    Attributes:
        seconds: wall-clock time; on CUDA until the device is done.
        cpu_seconds: processor time of this process, all threads.
        peak: bytes above those held at the start, at most: of the CUDA allocator, or of the process'
            resident memory; None where the system does not say (other than Linux).
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak: int | None = None


@contextmanager
def usage(device: torch.device) -> Iterator[Usage]:
    """Measures what happens inside it."""
    result = Usage()
    _wait(device)
    before = _start_peak(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    yield result
    _wait(device)
    result.seconds, result.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    if before is not None:
        result.peak = _peak(device) - before


def _start_peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc keeps small freed blocks, which the next stretch would use for nothing
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def matmul_flops(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations per second of one large matrix product, the best of three: what a step is held against."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(4):
        with usage(device) as taken:
            torch.mm(a, a)
        times.append(taken.seconds)
    return 2 * side**3 / min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
