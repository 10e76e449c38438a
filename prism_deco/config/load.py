"""Loads the configuration of a command line (YAML files, choices, and `key=value` settings on top of the defaults), and
the stored `config.yaml` of a run or an export.

Stored files may come from somebody else: they hold plain values only, and their plug-ins are not imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.config.choices import (
    CONF_DIR,
    PROMPT_SETS,
    YAML_SUFFIXES,
    choice_path,
    choices,
    default_contents,
    plugins_of,
    with_set,
)  # fmt: skip
from prism_deco.config.compose import compose, default_run_id, set_key, takes_text, validate
from prism_deco.config.registry import require_imported
from prism_deco.config.schema import GROUPS
from prism_deco.config.values import RETIRED, flatten, parse_value, read_yaml, split_pair
from prism_deco.errors import UsageError
from prism_deco.files import refusals_named, write_whole

CONFIG = "config.yaml"

_PROMPT_SET = "recipe.prompt_set"

_CLOSED = ("recipe", "trainer")
"""Groups whose YAMLs cannot declare new options, since no component would read them."""


@dataclass
class _Arguments:
    """The parsed arguments of a command line.

    Attributes:
        choices: the named choices, by group.
        contents: groups of a stored configuration that come from the user's own YAML, not from a shipped choice.
        settings: key, value and file of each setting in YAML files, in order.
        overrides: key and text of each `key=value` argument, in order.
        stored: the stored configuration, if one is given.
        stored_set: its prompt set.
        plugins: modules that the YAMLs of the user's own choices list; `_load` fills it in.
    """

    choices: dict[str, str] = field(default_factory=dict)
    contents: dict[str, Any] = field(default_factory=dict)
    settings: list[tuple[str, Any, Path]] = field(default_factory=list)
    overrides: list[tuple[str, str]] = field(default_factory=list)
    stored: Path | None = None
    stored_set: str | None = None
    plugins: list[str] = field(default_factory=list)

    def choose(self, group: str, choice: str) -> None:
        """Takes a choice, which replaces a stored configuration's content of the group."""
        self.choices[group] = choice
        self.contents.pop(group, None)
        self.settings = [setting for setting in self.settings if not self.is_stored(setting, group)]

    def is_stored(self, setting: tuple[str, Any, Path], group: str) -> bool:
        key, _, file = setting
        return file.name == CONFIG and key.startswith(f"{group}.")


def load_config(overrides: Iterable[str] = ()) -> DictConfig:
    """Composes the configuration of a run.

    Args:
        overrides: as on the command line: `group=choice` and `key=value` pairs, and paths of YAML files with the same
            content, such as a run's `config.yaml`. Pairs override files.

    Raises:
        UsageError: an unknown choice or key (suggests similar ones), a value of a wrong type or out of range.
    """
    return _load(_read(overrides))


def _load(arguments: _Arguments) -> DictConfig:
    contents = default_contents(arguments.choices)
    # The prompt set comes first: its values are defaults that files and the command line override.
    given = {key: value for key, value, _ in arguments.settings}
    given |= {key: parse_value(key, text) for key, text in arguments.overrides if key == _PROMPT_SET}
    recipe = arguments.contents.get("recipe") or contents["recipe"]
    prompt_set = given.get(_PROMPT_SET, recipe.get("prompt_set"))
    if "llm" in arguments.contents:  # its prompt set is already applied
        if prompt_set != arguments.stored_set:
            raise UsageError(
                f"{arguments.stored} holds an LLM of your own with {_PROMPT_SET}={arguments.stored_set} applied: "
                f"name its YAML, llm=FILE.yaml, to use {prompt_set or 'null'}."
            )
        prompt_set = None
    contents = with_set(contents, prompt_set)
    origins = {group: f"{group}={choice}" for group, choice in arguments.choices.items()}
    closed = [group for group in _CLOSED if group not in arguments.contents]
    config = compose(contents | arguments.contents, origins, closed)
    for key, value, file in arguments.settings:
        set_key(config, key, value, str(file))
    written: Any = OmegaConf.to_container(config, resolve=False)
    for key, text in arguments.overrides:
        set_key(config, key, parse_value(key, text, is_text=takes_text(written, key)))
    if arguments.stored and "plugins" not in dict(arguments.overrides):
        require_imported(config.plugins, arguments.stored)
    # YAMLs that the user names may list plug-ins; benchmarks that only a stored configuration names do not count.
    own = {key: value for key, value, file in arguments.settings if file.name != CONFIG} | dict(arguments.overrides)
    named = [*arguments.choices.items(), ("benchmark", str(own.get("evaluate.benchmarks")))]
    yamls = [(group, text) for group, text in named if any(suffix in text for suffix in YAML_SUFFIXES)]
    arguments.plugins = [module for group, text in yamls for module in plugins_of(group, text)]
    config.plugins = list(dict.fromkeys([*config.plugins, *arguments.plugins]))
    validate(config)
    return config


def named_choice(group: str, overrides: Iterable[str]) -> str | None:
    """The choice of a group that a command line names; None if the default or a stored configuration applies."""
    arguments = _read(overrides)
    is_stored = any(arguments.is_stored(setting, group) for setting in arguments.settings)
    return None if is_stored else arguments.choices.get(group)


def value_origins(overrides: Iterable[str]) -> dict[str, str]:
    """Where each value of `load_config(overrides)` comes from, by dotted key: `command line`, the path of a YAML file,
    or `default` (the schema); followed by the reference (`${...}`) that gave the value, if any."""
    arguments = _read(overrides)
    config = _load(arguments)
    origins = dict.fromkeys(flat(config), "default")
    contents = default_contents(arguments.choices)
    prompt_set = None if "llm" in arguments.contents else config.recipe.prompt_set
    of_set: dict[str, str] = {}
    for key, content in contents.items():
        choice = arguments.choices.get(key) or (content["name"] if key in GROUPS else "")
        path = choice_path(key, choice) if key in GROUPS else CONF_DIR / CONFIG
        shown = str(path.relative_to(CONF_DIR.parent) if path.is_relative_to(CONF_DIR) else path)
        origins |= dict.fromkeys(flatten({key: content}), shown)
        if key == "llm" and prompt_set:
            for name in flatten(content[PROMPT_SETS][prompt_set]):
                of_set[name if name.startswith("recipe.") else f"llm.{name}"] = f"{shown}, {PROMPT_SETS}.{prompt_set}"
    origins |= of_set
    for group, content in arguments.contents.items():
        origins |= dict.fromkeys(flatten({group: content}), f"{arguments.stored}")
    for key, _, file in arguments.settings:
        origins[key] = str(file)
    for key, _ in arguments.overrides:
        origins |= {name: "command line" for name in origins if f"{name}.".startswith(f"{key}.")}
    if arguments.plugins:
        origins["plugins"] += f", and {', '.join(arguments.plugins)} by a choice's YAML"
    written: Any = OmegaConf.to_container(config, resolve=False)
    for key, value in flatten(written).items():
        if isinstance(value, str) and "${" in value:
            origins[key] += f", {value}"
    return {key: origins[key] for key in flat(config)}


def _read(overrides: Iterable[str]) -> _Arguments:
    files = []
    pairs = []
    for override in overrides:
        if "=" not in override and override.endswith(YAML_SUFFIXES):
            files.append(Path(override))
        elif "=" not in override and os.path.isfile(Path(override) / CONFIG):
            raise UsageError(f"{override} is a run's folder: name its configuration, {Path(override) / CONFIG}.")
        else:
            pairs.append(split_pair(override))
    arguments = _Arguments()
    for file in files:
        with refusals_named(file, "Name a YAML file."):
            is_there = file.is_file()
        if not is_there:
            raise UsageError(f"{file}: there is no such file.")
        if file.name == CONFIG:
            _add_stored(arguments, file)
        else:
            _add_file(arguments, file)
    for key, text in pairs:
        if key in GROUPS:
            arguments.choose(key, text)
        else:
            arguments.overrides.append((key, text))
    return arguments


def _add_file(arguments: _Arguments, file: Path) -> None:
    """Adds a user's YAML file. Under a group it has the name of a choice, or settings with the choice as `name`."""
    content = read_yaml(file)
    if {"axes", "rows", "parts"} & content.keys():
        raise UsageError(f"{file} is a sweep: `prism-deco sweep {file}` trains its cells.")
    for key, value in content.items():
        settings = {key: value}
        if key in GROUPS:
            if isinstance(value, list):
                raise UsageError(f"{file}: {key} must be the name of a choice, or settings of the group.")
            settings = dict(value) if isinstance(value, dict) else {"name": value}
            if "name" in settings:
                arguments.choose(key, str(settings.pop("name")))
            settings = {key: settings} if settings else {}
        arguments.settings += [(name, entry, file) for name, entry in flatten(settings).items()]


def _add_stored(arguments: _Arguments, file: Path) -> None:
    """Adds a run's configuration as choices plus changed values. The choices' references keep working this way:
    `recipe.num_tokens=9` still reaches the projector."""
    config = read_config(file)
    changed = changed_from_defaults(config)
    if config.run_id == default_run_id(config):
        changed.pop("run_id", None)  # derived from the choices, which the command line may replace
    chosen = shipped_choices(config)
    arguments.stored = file
    arguments.stored_set = config.recipe.prompt_set
    arguments.choices |= chosen
    arguments.contents |= {group: OmegaConf.to_container(config[group]) for group in GROUPS if group not in chosen}
    arguments.settings += [(key, value, file) for key, value in changed.items()]


def is_free(key: str) -> bool:
    """Whether an unfinished run may resume under another value of a key or group: one that changes where and how the
    run is computed but, up to rounding, not what is learned (see `training.run_dir`)."""
    free = ("trainer", "benchmark", "recipe.micro_batch_size", "data.num_workers", "runs_dir")
    return key in free or key.startswith(("trainer.", "evaluate.", "benchmark."))


def save_config(config: DictConfig, path: Path) -> None:
    """Writes the composed configuration with resolved references."""
    write_whole(path, OmegaConf.to_yaml(config, resolve=True))


def read_config(path: Path) -> DictConfig:
    """Reads what `save_config` wrote; missing keys take their defaults. Ranges are not checked again."""
    return compose(read_stored(path))


def read_stored(path: Path) -> dict[str, Any]:
    """The content of what `save_config` wrote, without retired keys.

    Raises:
        UsageError: there is no such file, or its values are not plain ones.
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
    """Resolving a stranger's `${oc.env:NAME}` would put a secret of this machine into the model's card."""
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
    """The configuration as `group.key` -> value with resolved references; lists stay whole."""
    return flatten(json.loads(json.dumps(OmegaConf.to_container(config, resolve=True))))


def shipped_choices(config: DictConfig) -> dict[str, str]:
    """The shipped choices of a configuration, by group; groups from a user's own YAML are left out."""
    named = {group: str(config[group].name) for group in GROUPS if config[group].name in choices(group)}
    composed = compose(_default_contents(named, config))
    return {group: name for group, name in named.items() if set(config[group]) <= set(composed[group])}


def _default_contents(chosen: Mapping[str, str], config: DictConfig) -> dict[str, Any]:
    """The contents of choices with the configuration's prompt set applied."""
    contents = default_contents(chosen)
    name = config.recipe.get("prompt_set")
    # A user's own LLM holds its values already, and another version may offer other sets.
    known = "llm" in chosen and name in (contents["llm"].get(PROMPT_SETS) or {})
    return with_set(contents, name if known else None)


def changed_from_defaults(config: DictConfig) -> dict[str, Any]:
    """The values that differ from those of the configuration's shipped choices, by dotted key.

    Groups from a user's own YAML are left out. A value that a reference (`${recipe.num_tokens}`) sets counts as changed
    only if it differs from what the reference resolves to.
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
