"""What the training of a configuration costs in arithmetic."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prism_deco.config.registry import require_imported
from prism_deco.config.schema import Config
from prism_deco.errors import UsageError
from prism_deco.plan.estimate import estimate_run

log = logging.getLogger(__name__)

_GROUPS = ["backbone", "projector", "llm", "data", "recipe", "trainer", "plugins"]


def flops_per_sample(config: DictConfig) -> float | None:
    """Floating-point operations of training on one sample, on average, as `prism-deco plan` counts them; None where
    they cannot be told: the data have no `statistics`, or the configuration is of another version."""
    if config.data.get("statistics") is None:
        return None  # to plan would be to read the data
    # A run of an earlier version lacks the keys that were added since.
    defaults: Any = OmegaConf.to_container(OmegaConf.structured(Config))
    chosen: Any = OmegaConf.merge({name: defaults[name] for name in _GROUPS}, OmegaConf.masked_copy(config, _GROUPS))
    # The costs depend on neither: the cells of a study share few plans.
    chosen.recipe.lr, chosen.recipe.max_steps = 0.0, None
    return _flops_per_sample(OmegaConf.to_yaml(chosen, resolve=True))


@cache
def _flops_per_sample(text: str) -> float | None:
    """Of a whole training with this configuration."""
    config: Any = OmegaConf.create(text)
    try:
        require_imported(config.plugins, Path("config.yaml"))
        needs = estimate_run(config).needs
    except (UsageError, OmegaConfBaseException) as error:
        log.warning("What a step costs is not known: %s", error)
        return None
    return needs.flops / needs.records / config.recipe.epochs if needs is not None else None
