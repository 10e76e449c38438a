"""The shipped YAMLs, one per choice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_deco.config.parse import read_yaml
from prism_deco.config.registry import unknown
from prism_deco.errors import UsageError
from prism_deco.files import refusals_named

# In a wheel conf/ lies inside the package, in a checkout next to it.
_PACKAGE = Path(__file__).parents[1]
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

YAML_SUFFIXES = (".yaml", ".yml")


def choices(group: str) -> list[str]:
    """Names of the shipped YAMLs of a group."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def choice_path(group: str, choice: str) -> Path:
    """The YAML of a choice: a shipped name, or the path of a user's own file, which ends in `.yaml` or `.yml`."""
    return Path(choice) if choice.endswith(YAML_SUFFIXES) else CONF_DIR / group / f"{choice}.yaml"


def load_choice(group: str, choice: str) -> dict[str, Any]:
    """The content of a choice's YAML, plus its `name`. References such as `${recipe.num_tokens}` are left as they are.

    Args:
        choice: a name under `conf/<group>`, or the path of a YAML.

    Raises:
        UsageError: there is no such choice or file, or it is not valid YAML.
    """
    path = choice_path(group, choice)
    with refusals_named(path, f"Name a choice of {group}."):
        is_there = path.is_file()
    if not is_there:
        if choice.endswith(YAML_SUFFIXES):
            raise UsageError(f"{group}={choice}: there is no such file.")
        raise unknown(group, choice, choices(group))
    return {"name": path.stem} | read_yaml(path, group)


def default_contents(chosen: Mapping[str, str]) -> dict[str, Any]:
    """What `conf/config.yaml` composes: the content of each group's choice, and the values of other keys.

    Args:
        chosen: choices by group that replace its own.
    """
    content = read_yaml(CONF_DIR / "config.yaml")
    names = content.pop("defaults") | chosen
    return content | {group: load_choice(group, name) for group, name in names.items()}
