"""The chunked cross-entropy against torch's own over all logits at once."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from prism_deco.loss import summed_cross_entropy

ROWS, WIDTH, VOCABULARY = 23, 6, 40


def _inputs(dtype=torch.float64, bias: bool = True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return hidden, head, targets


def _gradients(loss, hidden, head):
    wanted = [hidden, *head.parameters()]
    return torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 22, 23, None])
def test_loss_and_gradients_are_those_of_all_logits_at_once(rows, bias):
    hidden, head, targets = _inputs(bias=bias)
    limit = rows and rows * VOCABULARY
    loss = 3.0 * summed_cross_entropy(hidden, head.weight, head.bias, targets, max_logits=limit)
    reference = 3.0 * F.cross_entropy(head(hidden), targets, reduction="sum")
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=0)
    for got, expected in zip(_gradients(loss, hidden, head), _gradients(reference, hidden, head), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_a_table_that_is_also_the_embedding_gets_both_gradients():
    table = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, requires_grad=True)
    ids, targets = torch.randint(VOCABULARY, (2, ROWS))
    loss = summed_cross_entropy(table[ids], table, None, targets, max_logits=4 * VOCABULARY)
    [got] = torch.autograd.grad(loss, [table])
    [expected] = torch.autograd.grad(F.cross_entropy(table[ids] @ table.T, targets, reduction="sum"), [table])
    torch.testing.assert_close(got, expected)


def test_frozen_weights_and_no_gradients_at_all():
    hidden, head, targets = _inputs()
    expected = _gradients(F.cross_entropy(head(hidden), targets, reduction="sum"), hidden, head)[0]
    head.requires_grad_(False)
    loss = summed_cross_entropy(hidden, head.weight, head.bias, targets, max_logits=VOCABULARY)
    torch.testing.assert_close(torch.autograd.grad(loss, [hidden])[0], expected)
    with torch.no_grad():
        plain = summed_cross_entropy(hidden, head.weight, head.bias, targets, max_logits=VOCABULARY)
    assert not plain.requires_grad and float(plain) == pytest.approx(float(loss.detach()))


def test_autocast_computes_in_bfloat16_and_returns_full_gradients():
    hidden, head, targets = _inputs(torch.float32)
    reference = F.cross_entropy(head(hidden), targets, reduction="sum")
    expected = _gradients(reference, hidden, head)
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_cross_entropy(hidden, head.weight, head.bias, targets, max_logits=8 * VOCABULARY)
    assert loss.dtype == torch.float32 and 0 < abs(float((loss - reference).detach())) < 2e-2 * float(
        reference.detach()
    )
    for got, whole in zip(_gradients(loss, hidden, head), expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, whole, rtol=5e-2, atol=5e-2)


def test_no_more_logits_exist_at_once_than_allowed():
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and result.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, result.shape[0])
            return result

    hidden, head, targets = _inputs()
    for limit, rows in ((5 * VOCABULARY, 5), (VOCABULARY // 2, 1), (None, ROWS)):
        with Largest() as seen:
            summed_cross_entropy(hidden, head.weight, head.bias, targets, max_logits=limit).backward()
        assert seen.rows == rows


def test_the_gradients_exist_once():
    hidden, head, targets = _inputs()
    loss = summed_cross_entropy(hidden, head.weight, head.bias, targets, max_logits=VOCABULARY)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="only one backward pass"):
        loss.backward()
