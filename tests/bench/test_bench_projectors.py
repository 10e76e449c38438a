"""The projector comparison at tiny sizes."""

import dataclasses
import io

import pytest
import torch
from rich.console import Console
from torch import nn

from prism_deco.bench.measure import step_memory
from prism_deco.bench.projectors import Sizes, bench_projectors, render
from prism_deco.plan.flops import step_flops
from prism_deco.projectors import PROJECTORS, build_projector

SIZES = Sizes(in_dim=8, out_dim=12, in_grid=(4, 4), num_tokens=4, batch_size=2)


@pytest.fixture(scope="module")
def rows():
    return bench_projectors(sizes=SIZES, dtypes=("float32",), repeats=2, warmup=0)


def test_a_row_per_projector(rows):
    assert [row.projector for row in rows] == PROJECTORS.names()
    for row in rows:
        compresses = PROJECTORS.get(row.projector).compresses
        module = build_projector(row.projector, 8, 12, (4, 4), 4 if compresses else None)
        assert row.params == sum(parameter.numel() for parameter in module.parameters())
        assert row.num_tokens == (4 if compresses else 16)
        assert row.dtype == "float32" and row.milliseconds > 0 and row.spread >= 0
        assert 2 * row.forward_flops < row.flops < 3.1 * row.forward_flops


def test_flops_of_linear(rows):
    row = next(row for row in rows if row.projector == "linear")
    first, second = 2 * 16 * 8 * 12, 2 * 16 * 12 * 12  # images x patches x in x out multiply-adds
    assert row.forward_flops == 2 * (first + second)
    # Backward: the weights of both layers, and the input of the second; the features need no gradient.
    assert row.flops == 2 * (first + second) + 2 * (first + 2 * second)


def test_flops_of_a_depthwise_convolution():
    conv = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.Conv2d(6, 4, 1, bias=False))
    depthwise, pointwise = 2 * 5 * 5 * 6 * 9, 2 * 5 * 5 * 6 * 4
    forward, total = step_flops(conv, torch.randn(1, 6, 5, 5))
    assert forward == depthwise + pointwise
    assert total == forward + depthwise + 2 * pointwise


def test_kept_activations_of_an_mlp():
    module, features = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 4)), torch.randn(5, 8)
    # Input of GELU and of the second layer; neither weights nor the module's own input count.
    assert step_memory(module, features) == 2 * 5 * 12 * 4


def test_dtypes():
    rows = bench_projectors(["avgpool"], SIZES, repeats=2)
    assert [row.dtype for row in rows] == ["float32", "bfloat16"]
    assert rows[0].params == rows[1].params and rows[0].flops == rows[1].flops
    assert rows[1].memory == rows[0].memory / 2


def test_table(rows):
    console = Console(width=200, record=True, file=io.StringIO())
    row = dataclasses.replace(rows[0], milliseconds=1.5, spread=0.25, params=1234567, memory=3 * 2**20, flops=2 * 10**9)
    console.print(render([row], SIZES, "cpu"))
    text = console.export_text()
    for part in ("16 patches of 8 -> 4 tokens of 12", "avgpool", "1,234,567", "1.50 ± 0.25", "3.0", "2.00"):
        assert part in text
    assert "activations kept" in text


def test_user_mistakes():
    with pytest.raises(ValueError, match="repeats=1"):
        bench_projectors(["avgpool"], SIZES, repeats=1)
    with pytest.raises(ValueError, match="Did you mean 'float32'"):
        bench_projectors(["avgpool"], SIZES, dtypes=("float", "float32"))
    with pytest.raises(ValueError, match="avgpool"):
        bench_projectors(["avg"], SIZES)
