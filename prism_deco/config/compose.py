"""Composes a configuration from the schema, one mapping per group, and single settings.

The dataclasses of `schema.py` define what is valid: unknown keys, wrong types and values out of range are errors.
Options of a single component (the depth of one projector, for example) are declared by its YAML, whose value is the
default and sets the type.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import field, fields, is_dataclass, make_dataclass
from functools import lru_cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, GrammarParseError, OmegaConfBaseException

from prism_deco.config.choices import choices, load_choice
from prism_deco.config.fields import Range
from prism_deco.config.registry import unknown
from prism_deco.config.schema import GROUPS, NAME_LISTS, SAMPLER, STATISTICS, Config
from prism_deco.config.values import RETIRED, flatten, is_text_key, schema_keys, type_text, value_text
from prism_deco.errors import UsageError

_LISTED = 12
"""Most keys of a group that a message lists; for larger groups it names the command that lists them."""

_GROUPS: dict[str, Any] = {group: Config.__dataclass_fields__[group].default_factory for group in GROUPS}
"""The dataclass of each group."""

_Options = tuple[tuple[str, Any], ...]
"""Keys and their types."""

_OTHER_NAMES = {
    "learning_rate": ["recipe.lr", "recipe.projector_lr"],
    "max_grad_norm": ["recipe.grad_clip"],
    "gradient_checkpointing": ["trainer.activation_checkpointing"],
}
"""Names of keys in other trainers that are too different for `difflib` to match."""


def compose(
    contents: Mapping[str, Any], origins: Mapping[str, str] | None = None, closed: Collection[str] = ()
) -> DictConfig:
    """Merges the schema with the content of each group and the values of the other keys.

    Args:
        origins: where the content of a group comes from, for messages: {"recipe": "recipe=mine.yaml"}.
        closed: groups whose content cannot declare new options.
    """
    own = {group: {} if group in closed else contents.get(group) or {} for group in GROUPS}
    schema = _schema(tuple((group, _options(group, content)) for group, content in own.items()))
    try:
        merged = OmegaConf.merge(schema, OmegaConf.create(dict(contents)))
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        origin = (origins or {}).get(key.partition(".")[0])
        value = flatten(contents).get(key, contents.get(key))
        raise _refusal(schema, key, value, error, f" ({origin})" if origin else "") from error
    assert isinstance(merged, DictConfig)
    return merged


def set_key(config: DictConfig, key: str, value: Any, origin: str = "") -> None:
    """Sets a dotted key, in place.

    Args:
        origin: the file that the value comes from, for messages.
    """
    if key in NAME_LISTS and isinstance(value, list):
        value = ",".join(map(str, value))
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException as error:
        raise _refusal(config, key, value, error, f" ({origin})" if origin else "") from error


def takes_text(content: Mapping[str, Any], key: str) -> bool:
    """Whether a key takes text: by the schema, or because its current value is text.

    Args:
        content: the configuration with unresolved references.
    """
    if is_text_key(key):
        return True
    value: Any = content
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return isinstance(value, str) and "${" not in value


def validate(config: DictConfig) -> None:
    """Checks a composed configuration against the schema's ranges and choices.

    Saved configurations are not checked again: they were valid when they were written, perhaps by another version.

    Raises:
        UsageError: the first value that is not allowed, or a reference (`${...}`) to a missing key.
    """
    try:
        content: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UsageError(f"{error.full_key}: {str(error).splitlines()[0]}.") from error

    values = flatten(content)
    written: Any = flatten(OmegaConf.to_container(config, resolve=False))  # type: ignore[arg-type]
    rules = {key: member.metadata["allowed"] for key, member in schema_keys().items() if "allowed" in member.metadata}
    # References last: the message names the key that holds a wrong value, not one that refers to it.
    for key in sorted(rules, key=lambda key: "${" in str(written[key])):
        _check_value(key, values[key], rules[key], content["plugins"])
    for key in content["data"]["statistics"] or {}:
        if key not in STATISTICS:
            raise unknown("key of data.statistics", key, STATISTICS)
    run_id = config.run_id or default_run_id(config)
    if run_id in (".", "..") or "/" in run_id or "\\" in run_id:
        raise UsageError(f"run_id={run_id} must be a single name, not a path; runs_dir=FOLDER sets the folder of runs.")


def default_run_id(config: DictConfig) -> str:
    """A name made of the choices and the seed: `mini_siglip-avgpool-mini_qwen2-shapes-mini-s7`."""
    names = [config[key].name for key in ("backbone", "projector", "llm", "data", "recipe")]
    return "-".join([*names, f"s{config.seed}"])


def _check_value(key: str, value: Any, rule: Range | tuple[str, ...], plugins: list[str]) -> None:
    if value is None:  # allowed or not by the schema's types, which OmegaConf has checked
        return
    if not isinstance(rule, Range):
        if value not in rule and not (rule is SAMPLER and plugins):  # plug-ins can register samplers
            raise unknown(key, value, rule)
        return
    numbers = value if isinstance(value, list | tuple) else [value]
    if not all(number in rule for number in numbers):
        shown = ",".join(f"{number:g}" if isinstance(number, float) else str(number) for number in numbers)
        finite = "" if all(map(math.isfinite, numbers)) else "finite and "
        if numbers is value:
            raise UsageError(f"{key}=[{shown}] must be {finite}{rule}, each.")
        raise UsageError(f"{key}={shown} must be {finite}{rule}.")


@lru_cache(maxsize=64)  # the slowest part of composing, and the same for many cells of a sweep
def _schema(options: tuple[tuple[str, _Options], ...]) -> DictConfig:
    """The dataclasses of all groups, extended by the options that YAMLs declare."""
    groups = []
    for group, own in options:
        base = _GROUPS[group]
        kind = make_dataclass(base.__name__, [(key, kind, field(default=None)) for key, kind in own], bases=(base,))
        groups.append((group, kind, field(default_factory=kind)))
    return OmegaConf.structured(make_dataclass("Config", groups, bases=(Config,)))


def _options(group: str, content: Mapping[str, Any]) -> _Options:
    """The options that a group's YAML declares, typed by their values."""
    known = {member.name for member in fields(_GROUPS[group])}
    options = []
    for key, value in content.items():
        if key in known:
            continue
        kind: Any = type(value) | None
        # None, containers and references do not tell the type.
        if value is None or isinstance(value, dict | list) or (isinstance(value, str) and "${" in value):
            kind = Any
        if is_text_key(f"{group}.{key}"):
            kind = str | None
        options.append((key, kind))
    return tuple(options)


def _refusal(config: DictConfig, key: str, value: Any, error: OmegaConfBaseException, origin: str) -> UsageError:
    """The error for a value that OmegaConf rejects."""
    for retired in (key, f"{key}={value}"):
        if retired in RETIRED:
            return UsageError(f"{retired}{origin}: {RETIRED[retired]}.")
    text = value_text(key, value)
    if isinstance(error, GrammarParseError):
        return UsageError(f"{key}={text} is not a valid reference{origin}: {str(error).splitlines()[0]}.")
    # For a key below a plain value, such as `recipe.lr.x`, OmegaConf's error names the parent.
    if isinstance(error, ConfigKeyError | ConfigAttributeError) or error.full_key != key:
        return _unknown_key(config, key, origin)
    return UsageError(f"{key}={text} must be {_expected(config, key)}{origin}.")


def _expected(config: DictConfig, key: str) -> str:
    """The type of a key, in words."""
    group, _, leaf = key.rpartition(".")
    node: Any = OmegaConf.select(config, group) if group else config
    kind = OmegaConf.get_type(node)
    annotation = {member.name: member.type for member in fields(kind)}.get(leaf) if is_dataclass(kind) else None
    if OmegaConf.is_dict(node.get(leaf)) and key in Config.__dataclass_fields__:
        if key == "benchmark":
            return "set key by key, for example benchmark.pope.root=FOLDER; evaluate.benchmarks=NAME chooses benchmarks"
        return f"set key by key, for example {key}.{next(iter(node[leaf]))}=NAME"
    return "names separated by commas such as a,b" if key in NAME_LISTS else type_text(annotation)


def _unknown_key(config: DictConfig, key: str, origin: str) -> UsageError:
    """The error for an unknown key, with suggestions."""
    content: Any = OmegaConf.to_container(config, resolve=False)
    names = sorted({*content, *flatten(content)})
    parent = key.rpartition(".")[0]
    siblings = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == parent]
    listed = f" Keys of {parent or 'the configuration'}: {', '.join(siblings)}." if siblings else ""
    if len(siblings) > _LISTED:
        listed = f" All keys: prism-deco keys {parent}."
    return UsageError(f"Unknown key {key}{origin}.{_hint(key, names)}{listed}")


def _hint(key: str, names: list[str]) -> str:
    """Suggests a key of the same name in another group or choice, or a key of similar spelling."""
    group, _, leaf = key.rpartition(".")
    longer = [name for name in names if name.startswith(f"{group}.") and name.endswith(f"_{leaf}")]
    same = longer + [name for name in names if name.rpartition(".")[2] == leaf]
    if not same and group in GROUPS:
        owners = [f"{group}={choice}" for choice in choices(group) if leaf in load_choice(group, choice)]
        if owners:
            return f" It is a key of {' or '.join(owners[:3])}."
    same = same or _OTHER_NAMES.get(leaf, [])
    near = same[:3] or difflib.get_close_matches(key, [name for name in names if name not in GROUPS], n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ""
