"""Floating-point operations by counting: torch's formulas per operation, with two corrections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, flop_registry, sdpa_flop_count, shape_wrapper

Shape = Sequence[int]


def step_flops(module: nn.Module, features: Tensor) -> tuple[int, int]:
    """Floating-point operations of the forward pass, and of the whole step: matrix products and convolutions."""
    with FlopCounterMode(display=False) as forward:
        module(features)
    module.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False, custom_mapping={_CONVOLUTION: _convolution_backward_flops}) as both:
        module(features).sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


def _convolution_backward_flops(grad: Shape, features: Shape, weight: Shape, *args: Any, **_: Any) -> int:
    """Either gradient of a convolution takes as many operations as the convolution did.

    Torch's own formula forgets the groups in the weight's gradient, which makes a depthwise convolution
    as dear as a dense one.
    """
    wanted: Sequence[bool] = args[-1]  # gradients of input, weight, bias; the bias' is not counted
    return (wanted[0] + wanted[1]) * conv_flop_count(list(features), list(weight), list(grad))


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Without the scores, which the kernel computes again only because it did not keep them."""
    return 2 * sdpa_flop_count(query, key, value)


_CONVOLUTION = torch.ops.aten.convolution_backward
_CORRECTED: dict[Any, Callable[..., int]] = {
    _CONVOLUTION: _convolution_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}

FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    **{operation: shape_wrapper(formula) for operation, formula in _CORRECTED.items()},
}
"""Per operation its count from its arguments and `out_val`, its result."""
