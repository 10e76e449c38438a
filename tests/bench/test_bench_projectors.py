"""The projector comparison at tiny sizes."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from prism_deco.bench.measure import Usage, activation_bytes
from prism_deco.bench.projectors import bench_projectors
from prism_deco.cli import main
from prism_deco.plan.flops import step_flops
from prism_deco.projectors import PROJECTORS, build_projector

SIZES = {"in_dim": 8, "out_dim": 12, "in_grid": (4, 4), "num_tokens": 4, "batch_size": 2, "device": torch.device("cpu")}


@pytest.fixture(scope="module")
def result():
    return bench_projectors([], **SIZES, dtypes=["float32"], repeats=2)


def test_a_row_per_projector(result):
    assert [row.name for row in result.rows] == PROJECTORS.names()
    for row in result.rows:
        compresses = PROJECTORS.get(row.name).compresses
        module = build_projector(row.name, 8, 12, (4, 4), 4 if compresses else None)
        facts = row.facts
        assert facts["params"] == sum(parameter.numel() for parameter in module.parameters())
        assert facts["num_tokens"] == (4 if compresses else 16)
        assert facts["dtype"] == "float32" and len(row.taken) == 2 and min(row.times()) > 0
        assert 2 * facts["forward_flops"] < facts["flops"] < 3.1 * facts["forward_flops"]


def test_flops_of_linear(result):
    facts = next(row for row in result.rows if row.name == "linear").facts
    first, second = 2 * 16 * 8 * 12, 2 * 16 * 12 * 12  # images x patches x in x out multiply-adds
    assert facts["forward_flops"] == 2 * (first + second)
    # Backward: the weights of both layers, and the input of the second; the features need no gradient.
    assert facts["flops"] == 2 * (first + second) + 2 * (first + 2 * second)


def test_flops_of_a_depthwise_convolution():
    conv = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.Conv2d(6, 4, 1, bias=False))
    depthwise, pointwise = 2 * 5 * 5 * 6 * 9, 2 * 5 * 5 * 6 * 4
    forward, total = step_flops(conv, torch.randn(1, 6, 5, 5))
    assert forward == depthwise + pointwise
    assert total == forward + depthwise + 2 * pointwise


def test_kept_activations_of_an_mlp():
    module, features = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 4)), torch.randn(5, 8)
    # Input of GELU and of the second layer; neither weights nor the module's own input count.
    assert activation_bytes(module, features) == 2 * 5 * 12 * 4


def test_dtypes():
    single, half = bench_projectors(["avgpool"], **SIZES, dtypes=["float32", "bfloat16"], repeats=2).rows
    assert [row.facts["dtype"] for row in (single, half)] == ["float32", "bfloat16"]
    assert single.facts["params"] == half.facts["params"] and single.facts["flops"] == half.facts["flops"]
    assert half.facts["activation_bytes"] == single.facts["activation_bytes"] / 2


def test_table(result):
    facts = {"params": 1234567, "activation_bytes": 3 * 2**20, "flops": 2 * 10**9}
    row = result.rows[0]
    changed = replace(row, taken=[Usage(0.001), Usage(0.0015), Usage(0.002)], facts=row.facts | facts)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(replace(result, rows=[changed]).table())
    text = console.export_text()
    for part in ("16 patches of 8 -> 4 tokens of 12", "avgpool", "1,234,567", "1.50 ± 0.50", "3.0", "2.00"):
        assert part in text


def test_user_mistakes():
    with pytest.raises(ValueError, match="repeats=1 shows no spread"):
        bench_projectors(["avgpool"], **SIZES, dtypes=["float32"], repeats=1)
    with pytest.raises(ValueError, match="avgpool"):
        bench_projectors(["avg"], **SIZES, dtypes=["float32"], repeats=2)


def test_a_projector_of_one_s_own_is_timed_by_its_yaml(capsys, monkeypatch):
    example = Path(__file__).parents[1] / "projectors/example"
    monkeypatch.syspath_prepend(example)
    PROJECTORS.names()  # what is imported while the copy stands would be lost with it
    monkeypatch.setattr(PROJECTORS, "_entries", dict(PROJECTORS._entries))
    sizes = ["--in-dim=8", "--out-dim=8", "--in-grid", "4", "4", "--num-tokens=4", "--batch-size=2", "--repeats=2"]
    assert main(["bench", "projectors", str(example / "token_merge.yaml"), *sizes]) == 0
    sys.modules.pop("token_merge")
    assert "token_merge" in capsys.readouterr().out
