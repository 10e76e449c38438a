"""The configuration: its schema, and the loader that composes YAML choices and `key=value` overrides.

`conf/config.yaml` names a default choice per group; `conf/<group>/<choice>.yaml` holds what that
choice sets. A command line such as `backbone=mini_clip recipe.epochs=2` replaces choices and keys.
The dataclasses of `schema.py` say what is valid: unknown keys, wrong types and values out of range are errors. The
keys that only one component has (the depth of one projector, say) are declared by that component's YAML: the value
there is the default and its type.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from prism_deco.config.registry import unknown
from prism_deco.config.schema import Config, Range, allowed
from prism_deco.errors import UsageError

# In a wheel conf/ lies inside the package, in a checkout beside it.
_PACKAGE = Path(__file__).parents[1]
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


GROUPS = tuple(
    f.name for f in fields(Config) if f.name not in ("evaluate", "benchmark", "seed", "runs_dir", "run_id", "plugins")
)

_FREE = ("trainer", "recipe.micro_batch_size", "data.num_workers", "runs_dir")


def is_free(key: str) -> bool:
    """Whether an unfinished run may go on under another value of a key, or group: it says where and how the run is
    computed, not what is learned (but for rounding, and see `training.folder`)."""
    return key in _FREE or key.startswith(("trainer.", "evaluate.", "benchmark."))


RETIRED = {
    "trainer.feature_cache=auto": "auto is no longer a choice, since it needed a plan of every run: use true where an "
    "image is seen several times, by epochs or by runs of a sweep, and the towers are much of the work, else false",
    "trainer.feature_cache_runs": "only trainer.feature_cache=auto used it, which is no longer a choice",
}
"""Keys and values of earlier versions: `read_config` leaves them out, a new configuration must not hold them."""


def cache_dir() -> Path:
    """Folder for what can be made again: indexes, rendered worlds, converted weights. `PRISM_DECO_CACHE` moves it."""
    # A variable that is set to nothing is not set: it would be the working directory.
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prism_deco"
    return Path(os.environ.get("PRISM_DECO_CACHE") or default)


def choices(group: str) -> list[str]:
    """Names of the shipped YAMLs of a group."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def load_choice(group: str, choice: str) -> dict[str, Any]:
    """The content of `conf/<group>/<choice>.yaml`, plus its `name`.

    `choice` is a shipped name, or the path of a YAML file of the user's own (it ends in `.yaml`).
    Interpolations such as `${recipe.num_tokens}` are left as they are.
    """
    path = Path(choice) if choice.endswith((".yaml", ".yml")) else CONF_DIR / group / f"{choice}.yaml"
    if not path.is_file():
        if path.parent == CONF_DIR / group:
            raise unknown(group, choice, choices(group))
        raise UsageError(f"{group}={choice}: there is no such file.")
    return {"name": path.stem} | read_yaml(path)


def load_config(overrides: Iterable[str] = ()) -> DictConfig:
    """Composes the configuration of a run.

    Args:
        overrides: `group=choice` and `key=value` pairs, as on the command line.

    Raises:
        UsageError: an unknown choice or key (with the nearest valid ones), a value of a wrong type or out of range.
    """
    chosen, values = _split(overrides)
    defaults = read_yaml(CONF_DIR / "config.yaml")
    chosen = defaults.pop("defaults") | chosen
    contents = {group: load_choice(group, choice) for group, choice in chosen.items()}
    config = compose(defaults | contents, values)
    validate(config)
    return config


def compose(contents: Mapping[Any, Any], values: Iterable[str] = ()) -> DictConfig:
    """Merges the schema, the given contents (one mapping per group) and `key=value` overrides."""
    values = list(values)
    update = parse_overrides(values)
    retired = [*_retired(contents), *_retired(update)]
    if retired:
        raise UsageError(f"{retired[0]}: {RETIRED[retired[0]]}.")
    groups = []
    for group in GROUPS:
        base = Config.__dataclass_fields__[group].default_factory
        kind = _extend(base, contents.get(group) or {})  # type: ignore[arg-type]
        groups.append((group, kind, field(default_factory=kind)))
    schema = OmegaConf.structured(make_dataclass("Config", groups, bases=(Config,)))
    config = _merge(schema, OmegaConf.create(dict(contents)))
    try:
        return _merge(config, update)
    except Exception:  # one by one they take longer, but the error names the value
        for value in values:
            config = _merge(config, parse_overrides([value]), source=value)
    return config


def validate(config: DictConfig) -> None:
    """Checks a composed configuration against the schema's ranges and choices.

    Not what was saved with a run: that one was accepted once, by this version's rules or an earlier one's.

    Raises:
        UsageError: the first key whose value is not allowed, and what is; or a reference (`${...}`) to nothing.
    """
    try:
        content = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UsageError(f"{error.full_key}: {str(error).splitlines()[0]}.") from error

    def refers(key: str) -> bool:
        group, _, leaf = key.rpartition(".")
        return OmegaConf.is_interpolation(config[group] if group else config, leaf)

    # A key that refers to another one comes last: the other one is where the wrong value stands.
    for key, rule in sorted(allowed().items(), key=lambda item: refers(item[0])):
        value: Any = content
        for part in key.split("."):
            value = value[part]
        if value is None:  # the schema's types say where that may be
            continue
        if isinstance(rule, Range):
            _check_range(key, value, rule)
        elif value not in rule:
            raise unknown(key, value, rule)
    run_id = config.run_id or default_run_id(config)
    if run_id in (".", "..") or "/" in run_id or "\\" in run_id:
        raise UsageError(f"run_id={run_id} must be a single name, not a path: runs_dir=FOLDER says where the run lies.")


def default_run_id(config: DictConfig) -> str:
    """A name made of the choices and the seed: `mini_siglip-avgpool-mini_qwen2-shapes-mini-s7`."""
    names = [config[key].name for key in ("backbone", "projector", "llm", "data", "recipe")]
    return "-".join([*names, f"s{config.seed}"])


def save_config(config: DictConfig, path: Path) -> None:
    """Writes the composed configuration, interpolations resolved."""
    path.write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")


def read_config(path: Path) -> DictConfig:
    """Reads what `save_config` wrote."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist: {path.parent} is not a run folder.")
    content = read_yaml(path)
    for key in _retired(content):
        group, _, leaf = key.partition("=")[0].rpartition(".")
        del content[group][leaf]
    return compose(content)


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a YAML file, interpolations left as they are.

    Raises:
        UsageError: it is no valid YAML (with the line), or something else than `key: value` lines.
    """
    try:
        content = _from_yaml(path.read_text(encoding="utf-8"))
    except _NotYAML as error:
        line = f", line {error.line}" if error.line else ""
        raise UsageError(f"{path}{line}: not valid YAML ({error}).") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text file in UTF-8 ({error}).") from error
    if not isinstance(content, dict | None):
        raise UsageError(f"{path}: expected `key: value` lines.")
    return {str(key): value for key, value in (content or {}).items()}


def parse_overrides(overrides: Iterable[str]) -> DictConfig:
    """`key=value` pairs as a configuration, values read as YAML.

    Raises:
        UsageError: names the one that is no pair, or whose value is no valid YAML.
    """
    config = OmegaConf.create()
    for override in overrides:
        key, text = _pair(override)
        parse_value(key, text)
        config.merge_with_dotlist([override])
    return config


def parse_value(key: str, text: str) -> Any:
    """A value of the command line as YAML reads it: `7` -> 7, `avgpool` -> "avgpool".

    Raises:
        UsageError: it is no valid YAML; names the key.
    """
    try:
        return _from_yaml(text)
    except _NotYAML as error:
        raise UsageError(f"{key}={text}: the value of {key} is not valid YAML ({error}).") from error


class _NotYAML(Exception):
    """What is wrong with a text, in one line.

    Attributes:
        line: where, counted from 1; None if that is not known.
    """

    def __init__(self, error: Exception):
        super().__init__(getattr(error, "problem", None) or str(error).splitlines()[0])
        mark = getattr(error, "problem_mark", None)
        self.line = mark.line + 1 if mark else None


def _from_yaml(text: str) -> Any:
    # Not by OmegaConf.create or OmegaConf.load: those take a word for a mapping.
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist([f"text={text}"]))
    except Exception as error:  # they have many classes
        raise _NotYAML(error) from error
    assert isinstance(content, dict)
    return content["text"]


def _check_range(key: str, value: Any, bounds: Range) -> None:
    numbers = value if isinstance(value, (list, tuple)) else (value,)
    if all(number in bounds for number in numbers):
        return
    shown = ",".join(f"{number:g}" if isinstance(number, float) else str(number) for number in numbers)
    finite = "" if all(map(math.isfinite, numbers)) else "finite and "
    if numbers is value:
        raise UsageError(f"{key}=[{shown}] must be {finite}{bounds}, each.")
    raise UsageError(f"{key}={shown} must be {finite}{bounds}.")


def _pair(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"{override!r} is not an override: write key=value, for example projector=avgpool.")
    return key, text


def _split(overrides: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    chosen: dict[str, str] = {}
    values: list[str] = []
    for override in overrides:
        key, text = _pair(override)
        if key in GROUPS:
            chosen[key] = text
        else:
            values.append(override)
    return chosen, values


def _retired(content: Mapping[Any, Any] | DictConfig) -> list[str]:
    """What of `RETIRED` a configuration, one mapping per group, holds."""
    found = []
    for key in RETIRED:
        name, _, value = key.partition("=")
        group, _, leaf = name.rpartition(".")
        settings = content.get(group)
        if isinstance(settings, Mapping | DictConfig) and leaf in settings and value in ("", settings[leaf]):
            found.append(key)
    return found


def _extend(base: type, content: Mapping[str, Any]) -> type:
    """The schema of one group: the base dataclass plus the keys its YAML declares, typed by their values."""
    known = {f.name for f in fields(base)}
    extra = []
    for key, value in content.items():
        if key in known:
            continue
        # Containers and None say nothing about the type of what may stand there.
        kind = Any if value is None or isinstance(value, (dict, list)) or _is_interpolation(value) else type(value)
        extra.append((key, kind if kind is Any else kind | None, field(default=None)))
    return make_dataclass(base.__name__, extra, bases=(base,))


def _is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _merge(config: DictConfig, update: DictConfig, source: str = "") -> DictConfig:
    try:
        merged = OmegaConf.merge(config, update)
    except (ConfigKeyError, ConfigAttributeError) as error:
        raise _unknown_key(config, update, source) from error
    except (ValidationError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{source or error.full_key}: {reason}.") from error
    assert isinstance(merged, DictConfig)
    return merged


def _unknown_key(config: DictConfig, update: DictConfig, source: str) -> UsageError:
    """Names the first key of `update` that `config` does not have, and the nearest that it has."""
    valid = set(_keys(config))
    wrong = next((key for key in _keys(update) if key not in valid), source)
    leaf = wrong.rpartition(".")[2]
    # A key of the right name in the wrong group is the commonest slip.
    near = [key for key in valid if key.rpartition(".")[2] == leaf] or difflib.get_close_matches(wrong, valid, n=3)
    hint = f" Did you mean {' or '.join(sorted(near)[:3])}?" if near else ""
    parent = wrong.rpartition(".")[0]
    siblings = sorted(key for key in valid if key.rpartition(".")[0] == parent)
    return UsageError(f"Unknown key {wrong}.{hint} Keys of {parent or 'the configuration'}: {', '.join(siblings)}.")


def _keys(config: DictConfig, prefix: str = "") -> Iterable[str]:
    for key in config:
        name = f"{prefix}{key}"
        yield name
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            yield from _keys(node, f"{name}.")
