"""Optimizer and learning-rate schedule (DeCo, Table 5)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from prism_deco.tensors import full
from prism_deco.vlm import VLM


def parameter_groups(
    projector: nn.Module,
    lm: nn.Module,
    tower: nn.Module | None = None,
    *,
    lr: float,
    projector_lr: float | None,
    tower_lr: float | None = None,
    weight_decay: float,
) -> list[dict]:
    """AdamW groups of the trained parameters: matrices decay, vectors and biases do not.

    The rule is that of prismatic-vlms (`ndim <= 1`, or a name that ends in `.bias`), applied to whole parameters.
    Prismatic applies it to FSDP's one-dimensional views, which silently turns the decay off; parameters under
    `fully_shard` keep their dimensions.
    """
    groups = []
    seen: set[int] = set()
    parts = (("projector", projector, projector_lr), ("lm", lm, None), ("tower", tower, tower_lr))
    for part, module, own_lr in parts:
        rate = lr if own_lr is None else own_lr
        decayed, plain = [], []
        for name, parameter in module.named_parameters() if module is not None else ():
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            (plain if parameter.ndim <= 1 or name.endswith(".bias") else decayed).append(parameter)
        groups += [
            {"name": f"{part}/decay", "params": decayed, "lr": rate, "weight_decay": weight_decay},
            {"name": f"{part}/no_decay", "params": plain, "lr": rate, "weight_decay": 0.0},
        ]
    return [group for group in groups if group["params"]]


def adamw(vlm: VLM, recipe: DictConfig) -> AdamW:
    """The recipe's optimizer, in its fused version, which makes no temporary copies of weights and gradients."""
    rates = {"lr": recipe.lr, "projector_lr": recipe.projector_lr, "tower_lr": recipe.tower_lr}
    groups = parameter_groups(vlm.projector, vlm.lm, vlm.backbone, **rates, weight_decay=recipe.weight_decay)
    return AdamW(groups, betas=tuple(recipe.betas), eps=recipe.eps, fused=True)


def warmup_cosine(optimizer: AdamW, total_steps: int, warmup_ratio: float, rounding: str = "down") -> LambdaLR:
    """Linear warm-up from 0 over a fraction of the steps, then cosine decay to 0 (DeCo, Table 5).

    The first step has a rate of 0 even if the warm-up is rounded down to no step at all, as in prismatic-vlms; with a
    `warmup_ratio` of 0 it has the peak rate.

    Args:
        rounding: "down" to whole steps (prismatic-vlms), or "up" (transformers' Trainer, which LLaVA uses).
    """
    warmup = total_steps * warmup_ratio
    schedule = get_cosine_schedule_with_warmup(
        optimizer, math.ceil(warmup) if rounding == "up" else int(warmup), total_steps
    )
    if warmup > 0:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    return schedule


def grad_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The global L2 norm of the gradients, float[]; of sharded ones over all processes."""
    return full(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
