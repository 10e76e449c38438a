"""Which runs can use one cache of features, told from their configurations alone: a sweep asks this for all its cells,
and its driver imports nothing heavy."""

from __future__ import annotations

import json

from omegaconf import DictConfig, OmegaConf

from prism_deco.config.registry import unknown
from prism_deco.config.schema import DataConfig
from prism_deco.errors import UsageError

MODES = {"off": "off", "on": "on", "auto": "auto", "False": "off", "True": "on"}
"""Values of `trainer.feature_cache`; YAML reads an unquoted off or on as a truth value."""

_IMAGES = {"limit", "val_fraction", "draft_jpeg"}
"""Keys that every data set has and that say which images there are, or how they are decoded."""


def mode(config: DictConfig) -> str:
    """off | on | auto, as `trainer.feature_cache` says; `UsageError` where it says something else."""
    if config.trainer.feature_cache not in MODES:
        raise unknown("trainer.feature_cache", config.trainer.feature_cache, set(MODES.values()))
    if config.trainer.feature_cache_runs < 1:
        raise UsageError(f"trainer.feature_cache_runs={config.trainer.feature_cache_runs} must be at least 1.")
    return MODES[config.trainer.feature_cache]


def sharing(config: DictConfig) -> str:
    """Equal for runs that share a cache, as far as that can be said before weights and data are read.

    Projectors are told apart by name: those that do not pool share the features of all patches in fact, too, but who
    pools is not known here. Runs are then counted too few, and `auto` is the more careful.
    """
    content = OmegaConf.to_container(config, resolve=True)
    assert isinstance(content, dict)
    data, trainer = content["data"], content["trainer"]
    told = {
        "backbone": content["backbone"],
        # Towers without weights on disk are drawn by the seed.
        "seed": None if content["backbone"]["pretrained"] else content["seed"],
        "data": {k: v for k, v in data.items() if k in _IMAGES or k not in DataConfig.__dataclass_fields__},
        # Half precision comes by autocast, or by sharding.
        "compute": [trainer["precision"], trainer["strategy"] == "fsdp"],
        "projector": [content["projector"]["name"], content["projector"].get("num_tokens")],
    }
    return json.dumps(told, sort_keys=True, default=str)
