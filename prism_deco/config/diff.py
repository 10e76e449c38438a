"""How two configurations differ."""

from __future__ import annotations

import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.config.choices import choices, default_contents
from prism_deco.config.compose import compose, set_key
from prism_deco.config.parse import flatten
from prism_deco.config.schema import GROUPS


def flat(config: DictConfig) -> dict[str, Any]:
    """The configuration as `group.key` -> value, references resolved; lists stay whole."""
    return flatten(json.loads(json.dumps(OmegaConf.to_container(config, resolve=True))))


def shipped_choices(config: DictConfig) -> dict[str, str]:
    """The shipped choices of a configuration by group, without the groups that a user's own YAML fills."""
    named = {group: str(config[group].name) for group in GROUPS if config[group].name in choices(group)}
    composed = compose(default_contents(named))
    return {group: name for group, name in named.items() if set(config[group]) <= set(composed[group])}


def changed_from_defaults(config: DictConfig) -> dict[str, Any]:
    """The values that differ from what the configuration's shipped choices compose to, by dotted key.

    Groups that a user's own YAML fills are left out. A value that follows from a reference (`${recipe.num_tokens}`) is
    no difference as long as it is what the reference gives.
    """
    chosen = shipped_choices(config)
    default = compose(default_contents(chosen))
    written = flatten(OmegaConf.to_container(default, resolve=False))  # type: ignore[arg-type]
    references = {key for key, value in written.items() if isinstance(value, str) and "${" in value}
    own = tuple(f"{group}." for group in GROUPS if group not in chosen)
    values = {key: value for key, value in flat(config).items() if not key.startswith(own)}
    changed = _differing(values, default, values.keys() - references)
    for key, value in changed.items():
        set_key(default, key, value)
    changed |= _differing(values, default, references)
    return {key: value for key, value in values.items() if key in changed}


def _differing(values: dict[str, Any], default: DictConfig, keys: set[str]) -> dict[str, Any]:
    expected = flat(default)
    return {key: values[key] for key in keys & values.keys() if values[key] != expected.get(key, ...)}
