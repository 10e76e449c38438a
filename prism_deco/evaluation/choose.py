"""From names to benchmarks: single choices, groups of them, and their YAMLs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from prism_deco.config import load_choice
from prism_deco.evaluation.base import BENCHMARKS, Benchmark


def build_benchmark(choice: str | Mapping[str, Any], **overrides: Any) -> Benchmark:
    """Builds a benchmark.

    Args:
        choice: a name under `conf/benchmark` (or the path of a YAML), or the mapping of one.
        overrides: keys to replace, such as `root`, `split` or `limit`.

    Raises:
        ValueError: an unknown choice, family or key, with the nearest valid ones; a group.
    """
    content = dict(load_choice("benchmark", choice) if isinstance(choice, str) else choice) | overrides
    if "members" in content:
        raise ValueError(f"{content['name']} is a group of benchmarks: {', '.join(content['members'])}. Name one.")
    if "family" not in content:
        raise ValueError(f"The benchmark {content.get('name')!r} has no `family`. Families: {_families()}.")
    family = BENCHMARKS.get(content.pop("family"))
    valid = _keys(family)
    for key in content:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(
                f"Unknown key {key} of the benchmark {content.get('name')}.{hint} Keys: {', '.join(valid)}."
            )
    missing = [key for key, required in valid.items() if required and key not in content]
    if missing:
        raise ValueError(f"The benchmark {content.get('name')} lacks the key {' and '.join(missing)}.")
    return family(**content)


def resolve(names: str | Iterable[str]) -> list[str]:
    """Benchmark names with their groups (YAMLs with `members`) expanded; each once, in order.

    Args:
        names: a list, or a string with commas.

    Raises:
        ValueError: an unknown name, or groups that contain each other.
    """
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",") if name.strip()]
    return list(dict.fromkeys(member for name in names for member in _expand(name, ())))


def _expand(name: str, parents: tuple[str, ...]) -> list[str]:
    if name in parents:
        raise ValueError(f"The benchmark groups {' > '.join((*parents, name))} contain each other.")
    members = load_choice("benchmark", name).get("members")
    if members is None:
        return [name]
    return [leaf for member in members for leaf in _expand(member, (*parents, name))]


def _families() -> str:
    return ", ".join(BENCHMARKS.names())


def _keys(family: type[Benchmark]) -> dict[str, bool]:
    """Keyword arguments of a family, its bases' included: whether each is required."""
    keys: dict[str, bool] = {}
    for base in family.__mro__:
        if "__init__" in vars(base) and issubclass(base, Benchmark):
            for name, parameter in inspect.signature(base.__init__).parameters.items():
                if parameter.kind is parameter.KEYWORD_ONLY:
                    keys.setdefault(name, parameter.default is parameter.empty)
    return keys
