"""Chunked cross-entropy for large vocabularies.

With 150 000 tokens the logits are the largest tensors of a training step, and a plain backward pass needs three of
their size: the logits, the log-probabilities and the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_LEAST = torch.float32
"""The lowest precision of logits: half precision is too coarse for the normaliser."""


def summed_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, max_logits: int | None = None
) -> Tensor:
    """The summed cross-entropy of a linear output layer.

    Args:
        hidden: float[K, E], the hidden states that predict.
        weight: float[V, E] of the output layer; may be tied to the embeddings.
        bias: float[V] or None.
        targets: int64[K].
        max_logits: number of logits (positions times vocabulary) in memory at once; None is unlimited. More logits are
            computed in chunks, each with its gradient in the forward pass, so that none are kept for the backward pass
            or computed twice.

    Returns:
        float[], nats; float32, or float64 for float64 weights.
    """
    rows = len(hidden) if max_logits is None else max(1, max_logits // len(weight))
    if len(hidden) <= rows:
        logits = F.linear(hidden, weight, bias)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, _LEAST)), targets, reduction="sum")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        # Autocast does not apply inside a custom function: cast here, where autograd records the casts.
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return _Chunked.apply(hidden, weight, bias, targets, rows)  # type: ignore[no-any-return]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype = torch.promote_types(hidden.dtype, _LEAST)
        total = hidden.new_zeros((), dtype=dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = None if bias is None or not need_bias else torch.zeros_like(bias)
        for at in range(0, len(hidden), rows):
            part, wanted = hidden[at : at + rows], targets[at : at + rows, None]
            logits = F.linear(part, weight, bias).to(dtype)
            largest = logits.amax(dim=1, keepdim=True)
            reached = logits.gather(1, wanted) - largest
            # In place from here on, so that no second tensor of this size exists.
            sums = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
            total += (sums.log() - reached).sum()
            if grad_hidden is None and grad_weight is None and grad_bias is None:
                continue
            # The gradient is the softmax, minus one at the target.
            grad = logits.div_(sums).scatter_add_(1, wanted, -torch.ones_like(sums)).to(hidden.dtype)
            del logits
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[at : at + rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, part)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            del grad  # before the next logits
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Drop the references: autograd adopts a gradient without a copy if nothing else refers to it.
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "a chunked loss supports only one backward pass"
        return *(None if g is None else g.mul_(grad) for g in gradients), None, None
