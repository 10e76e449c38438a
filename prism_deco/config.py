"""The configuration: its schema, and the loader that composes YAML choices and `key=value` overrides.

`conf/config.yaml` names a default choice per group; `conf/<group>/<choice>.yaml` holds what that
choice sets. A command line such as `backbone=mini_clip recipe.epochs=2` replaces choices and keys.
The dataclasses of `schema.py` say what is valid: unknown keys and wrong types are errors. The keys that only one
component has (the depth of one projector, say) are declared by that component's YAML: the value
there is the default and its type.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from prism_deco.registry import unknown
from prism_deco.schema import Config

# In a wheel conf/ lies inside the package, in a checkout beside it.
_PACKAGE = Path(__file__).parent
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


GROUPS = tuple(f.name for f in fields(Config) if f.name not in ("evaluate", "seed", "runs_dir", "run_id", "plugins"))


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
        raise ValueError(f"{group}={choice}: there is no such file.")
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected `key: value` lines.")
    return {"name": path.stem} | {str(key): value for key, value in content.items()}


def load_config(overrides: Iterable[str] = ()) -> DictConfig:
    """Composes the configuration of a run.

    Args:
        overrides: `group=choice` and `key=value` pairs, as on the command line.

    Raises:
        ValueError: an unknown choice or key (with the nearest valid ones) or a value of a wrong type.
    """
    chosen, values = _split(overrides)
    defaults = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "config.yaml"))
    assert isinstance(defaults, dict)
    chosen = defaults.pop("defaults") | chosen
    contents = {group: load_choice(group, choice) for group, choice in chosen.items()}
    return compose(defaults | contents, values)


def compose(contents: Mapping[Any, Any], values: Iterable[str] = ()) -> DictConfig:
    """Merges the schema, the given contents (one mapping per group) and `key=value` overrides."""
    groups = []
    for group in GROUPS:
        base = Config.__dataclass_fields__[group].default_factory
        kind = _extend(base, contents.get(group) or {})  # type: ignore[arg-type]
        groups.append((group, kind, field(default_factory=kind)))
    schema = OmegaConf.structured(make_dataclass("Config", groups, bases=(Config,)))
    config = _merge(schema, OmegaConf.create(dict(contents)))
    values = list(values)
    try:
        return _merge(config, OmegaConf.from_dotlist(values))
    except Exception:  # one by one they take longer, but the error names the value
        for value in values:
            config = _merge(config, _parse(value), source=value)
    return config


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
        raise ValueError(f"{path} does not exist: {path.parent} is not a run folder.")
    content = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected `key: value` lines.")
    return compose(content)


def _split(overrides: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    chosen: dict[str, str] = {}
    values: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r} is not an override: write key=value, for example projector=avgpool.")
        if key in GROUPS:
            chosen[key] = text
        else:
            values.append(override)
    return chosen, values


def _parse(value: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([value])
    except Exception as error:  # YAML errors have many classes, and none names the key
        key = value.partition("=")[0]
        raise ValueError(f"{value}: the value of {key} is not valid YAML ({error}).") from error


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
        raise ValueError(f"{source or error.full_key}: {reason}.") from error
    assert isinstance(merged, DictConfig)
    return merged


def _unknown_key(config: DictConfig, update: DictConfig, source: str) -> ValueError:
    """Names the first key of `update` that `config` does not have, and the nearest that it has."""
    valid = set(_keys(config))
    wrong = next((key for key in _keys(update) if key not in valid), source)
    leaf = wrong.rpartition(".")[2]
    # A key of the right name in the wrong group is the commonest slip.
    near = [key for key in valid if key.rpartition(".")[2] == leaf] or difflib.get_close_matches(wrong, valid, n=3)
    hint = f" Did you mean {' or '.join(sorted(near)[:3])}?" if near else ""
    parent = wrong.rpartition(".")[0]
    siblings = sorted(key for key in valid if key.rpartition(".")[0] == parent)
    return ValueError(f"Unknown key {wrong}.{hint} Keys of {parent or 'the configuration'}: {', '.join(siblings)}.")


def _keys(config: DictConfig, prefix: str = "") -> Iterable[str]:
    for key in config:
        name = f"{prefix}{key}"
        yield name
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            yield from _keys(node, f"{name}.")
