"""The `config.yaml` of a run or an export: plain values, which nothing resolves and whose plug-ins nobody imports; and
how it differs from the choices it names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.config.choices import PROMPT_SETS, choices, default_contents, with_set
from prism_deco.config.compose import compose, set_key
from prism_deco.config.keys import RETIRED
from prism_deco.config.parse import flatten, read_yaml
from prism_deco.config.schema import GROUPS
from prism_deco.errors import UsageError
from prism_deco.files import write_whole

CONFIG = "config.yaml"


def is_free(key: str) -> bool:
    """Whether an unfinished run may continue under another value of a key, or group: it says where and how the run is
    computed, not what is learned (except for rounding; see `training.run_dir`)."""
    free = ("trainer", "benchmark", "recipe.micro_batch_size", "data.num_workers", "runs_dir")
    return key in free or key.startswith(("trainer.", "evaluate.", "benchmark."))


def save_config(config: DictConfig, path: Path) -> None:
    """Writes the composed configuration, references resolved."""
    write_whole(path, OmegaConf.to_yaml(config, resolve=True))


def read_config(path: Path) -> DictConfig:
    """Reads what `save_config` wrote; keys that it does not hold are at their defaults. Ranges are not checked again.

    Raises:
        UsageError: as for `read_stored`, or the schema does not take it.
    """
    return compose(read_stored(path))


def read_stored(path: Path) -> dict[str, Any]:
    """What `save_config` wrote, as it stands in the file; retired keys are left out.

    Raises:
        UsageError: there is no such file, or it is not a stored configuration of plain values.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist: {path.parent} is not a run folder.")
    content = read_yaml(path)
    _refuse_references(content, path)
    for key in RETIRED:
        name, _, value = key.partition("=")
        group, _, leaf = name.rpartition(".")
        if leaf in content.get(group, {}) and value in ("", content[group][leaf]):
            del content[group][leaf]
    return content


def _refuse_references(content: Any, path: Path, key: str = "") -> None:
    """The folder may be somebody else's: `${oc.env:NAME}` would put a secret of this machine into the model's card."""
    if isinstance(content, dict):
        for name, value in content.items():
            _refuse_references(value, path, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list):
        for value in content:
            _refuse_references(value, path, key)
    elif isinstance(content, str) and "${" in content:
        raise UsageError(
            f"{path}: {key} is a reference ({content}). A stored configuration has plain values only. References are "
            "for YAML files of your own, under another name than config.yaml."
        )


def flat(config: DictConfig) -> dict[str, Any]:
    """The configuration as `group.key` -> value, references resolved; lists stay whole."""
    return flatten(json.loads(json.dumps(OmegaConf.to_container(config, resolve=True))))


def shipped_choices(config: DictConfig) -> dict[str, str]:
    """The shipped choices of a configuration by group, without the groups that a user's own YAML fills."""
    named = {group: str(config[group].name) for group in GROUPS if config[group].name in choices(group)}
    composed = compose(_default_contents(named, config))
    return {group: name for group, name in named.items() if set(config[group]) <= set(composed[group])}


def _default_contents(chosen: Mapping[str, str], config: DictConfig) -> dict[str, Any]:
    """What choices compose to under the configuration's prompt set."""
    contents = default_contents(chosen)
    name = config.recipe.get("prompt_set")
    # An LLM of the user's own has its values already, and another version may offer other sets.
    known = "llm" in chosen and name in (contents["llm"].get(PROMPT_SETS) or {})
    return with_set(contents, name if known else None)


def changed_from_defaults(config: DictConfig) -> dict[str, Any]:
    """The values that differ from what the configuration's shipped choices compose to, by dotted key.

    Groups that a user's own YAML fills are left out. A value that follows from a reference (`${recipe.num_tokens}`) is
    no difference as long as it is what the reference gives.
    """
    chosen = shipped_choices(config)
    default = compose(_default_contents(chosen, config))
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
