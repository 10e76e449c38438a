"""The shipped YAMLs, one per choice, and what names of benchmarks stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prism_deco.config.registry import unknown
from prism_deco.config.values import read_yaml
from prism_deco.errors import UsageError

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
    if not path.is_file():
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


def resolve_benchmarks(names: str | Iterable[str], parents: tuple[str, ...] = ()) -> list[str]:
    """Benchmark names with their groups (YAMLs with `members`) expanded; each once, in order.

    Args:
        names: a list, or a string with commas.
        parents: the groups that the names are members of.

    Raises:
        UsageError: an unknown name, or groups that contain each other.
    """
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",") if name.strip()]
    found: list[str] = []
    for name in names:
        if name in parents:
            raise UsageError(f"The benchmark groups {' > '.join((*parents, name))} contain each other.")
        members = load_choice("benchmark", name).get("members")
        found += [name] if members is None else resolve_benchmarks(members, (*parents, name))
    return list(dict.fromkeys(found))


def benchmark_name(choice: str) -> str:
    """The name of a benchmark that is chosen by its name or by the path of its YAML."""
    return Path(choice).stem if choice.endswith(YAML_SUFFIXES) else choice


def results_name(choice: str, split: str | None = None) -> str:
    """The name of a benchmark's results folder: the benchmark's, followed by the split unless it is the YAML's own."""
    own = load_choice("benchmark", choice).get("split") or ""
    name = benchmark_name(choice)
    return name if split in (None, own) else f"{name}-{split}"
