"""The compute of a study's trainings."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prism_deco.config.registry import require_imported
from prism_deco.config.schema import Config
from prism_deco.errors import UsageError
from prism_deco.plan.estimate import estimate_run
from prism_deco.report.cells import RunCell

log = logging.getLogger(__name__)

TOLERANCE = 0.01
"""Relative difference in compute of two trainings that still counts as equal: steps are whole."""

_GROUPS = ["backbone", "projector", "llm", "data", "recipe", "trainer", "plugins"]


def training_flops(cell: RunCell) -> float | None:
    """Floating-point operations of a training; None where they are not known, or it has not finished."""
    if not cell.manifest or cell.config is None:
        return None
    per_sample = _flops_per_sample(cell.config)
    return per_sample * cell.manifest["samples"] if per_sample is not None else None


def _flops_per_sample(config: DictConfig) -> float | None:
    """Of training on one sample, on average, as `prism-deco plan` counts them; None where the data have no `statistics`
    or the configuration is of another version."""
    if config.data.get("statistics") is None:
        return None  # the planner would read the data
    # A run of an earlier version does not have the keys that were added since.
    defaults: Any = OmegaConf.to_container(OmegaConf.structured(Config))
    chosen: Any = OmegaConf.merge({name: defaults[name] for name in _GROUPS}, OmegaConf.masked_copy(config, _GROUPS))
    # The costs depend on neither, and so the cells of a study share few plans.
    chosen.recipe.lr = 0.0
    chosen.recipe.max_steps = None
    return _planned_flops(OmegaConf.to_yaml(chosen, resolve=True))


@cache
def _planned_flops(text: str) -> float | None:
    """Per sample, of a configuration as YAML."""
    config: Any = OmegaConf.create(text)
    try:
        require_imported(config.plugins, Path("config.yaml"))
        needs = estimate_run(config).needs
    except (UsageError, OmegaConfBaseException) as error:
        log.warning("The compute of a step is not known: %s", error)
        return None
    return needs.flops / needs.records / config.recipe.epochs if needs is not None else None


def same_compute(cells: Iterable[RunCell]) -> bool | None:
    """Whether the trainings had the same compute; None where it is not known of one of them."""
    costs = [training_flops(cell) for cell in cells]
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs) or not known:
        return None
    return max(known) <= (1 + TOLERANCE) * min(known)
