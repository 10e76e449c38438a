"""Time, arithmetic and memory of one forward and backward pass of a module whose input needs no gradient."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


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


def step_flops(module: nn.Module, features: Tensor) -> tuple[int, int]:
    """Floating-point operations of the forward pass, and of the whole step: matrix products and convolutions."""
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with FlopCounterMode(display=False) as forward:
        module(features)
    with FlopCounterMode(display=False, custom_mapping=formulas) as both:
        step(module, features)
    return forward.get_total_flops(), both.get_total_flops()


def _convolution_backward_flops(
    grad_shape: Sequence[int], input_shape: Sequence[int], weight_shape: Sequence[int], *args: Any, **_: Any
) -> int:
    """Either gradient of a convolution takes as many operations as the convolution did.

    Torch's own formula forgets the groups in the weight's gradient, which makes a depthwise convolution
    as dear as a dense one.
    """
    wanted: Sequence[bool] = args[-1]  # gradients of input, weight, bias; the bias' is not counted
    return (wanted[0] + wanted[1]) * conv_flop_count(list(input_shape), list(weight_shape), list(grad_shape))


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
