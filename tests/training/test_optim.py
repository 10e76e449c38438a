import math

import pytest
import torch
from torch import nn
from transformers import TrainingArguments, get_cosine_schedule_with_warmup

from prism_deco.training.optim import grad_norm, parameter_groups, warmup_cosine


def test_matrices_decay_and_tied_or_frozen_parameters_are_not_repeated():
    projector = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    lm = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7), "frozen": nn.Linear(2, 2)})
    lm["head"].weight = lm["embed"].weight
    lm["frozen"].requires_grad_(False)
    groups = {g["name"]: g for g in parameter_groups(projector, lm, lr=1e-3, projector_lr=2e-3, weight_decay=0.1)}
    assert {name: (len(g["params"]), g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "projector/decay": (1, 2e-3, 0.1),
        "projector/no_decay": (3, 2e-3, 0.0),
        "lm/decay": (1, 1e-3, 0.1),
        "lm/no_decay": (1, 1e-3, 0.0),
    }


def test_the_schedule_of_the_paper():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=2e-5)
    schedule = warmup_cosine(optimizer, total_steps=5198, warmup_ratio=0.03)
    rates = _rates(schedule, optimizer, 5198)
    assert rates[0] == 0.0
    assert rates[155] == pytest.approx(2e-5)  # floor(0.03 * 5198) = 155 warm-up steps
    assert rates[78] == pytest.approx(2e-5 * 78 / 155)
    assert rates[155 + 1000] == pytest.approx(1e-5 * (1 + math.cos(math.pi * 1000 / 5043)))
    assert schedule.get_last_lr()[0] == pytest.approx(0.0, abs=1e-12)


def _rates(schedule, optimizer, total):
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.03, 0.1, 0.5])
@pytest.mark.parametrize("rounding", ["down", "up"])
def test_each_step_has_the_rate_of_the_reference(ratio, rounding):
    """`down` as prismatic-vlms sets up transformers' schedule, `up` as transformers' Trainer does for LLaVA."""
    settings = TrainingArguments("unused", warmup_steps=ratio)
    for total in (*range(1, 41), *range(41, 201, 7)):
        ours, theirs = (torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=2e-5) for _ in range(2))
        schedule = warmup_cosine(ours, total, ratio, rounding)
        warmup = settings.get_warmup_steps(total) if rounding == "up" else int(total * ratio)
        reference = get_cosine_schedule_with_warmup(theirs, warmup, total)
        if rounding == "down" and ratio > 0:
            theirs.param_groups[0]["lr"] = 0.0
        rates = _rates(schedule, ours, total)
        assert rates == _rates(reference, theirs, total)
        assert rates[0] == (0.0 if ratio else 2e-5)


def test_the_global_norm():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert grad_norm([a, b]).item() == pytest.approx(5.0)


def test_a_rate_of_zero_is_a_rate():
    groups = parameter_groups(nn.Linear(2, 2), nn.Linear(2, 2), lr=1.0, projector_lr=0.0, weight_decay=0.0)
    assert {group["name"]: group["lr"] for group in groups}["projector/decay"] == 0.0
