"""Names of benchmarks: groups of them, and what their results are called."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prism_deco.config.choices import YAML_SUFFIXES, load_choice
from prism_deco.config.schema import AS_TRAINED
from prism_deco.errors import UsageError


def resolve_benchmarks(names: str | Iterable[str], parents: tuple[str, ...] = ()) -> list[str]:
    """Benchmark names with their groups (YAMLs with `members`) expanded; each once, in order.

    Args:
        names: a list, or a string with commas.
        parents: the groups that the names are members of.

    Raises:
        UsageError: an unknown name, or groups that contain each other.
    """
    found: list[str] = []
    for name in _split(names):
        if name in parents:
            raise UsageError(f"The benchmark groups {' > '.join((*parents, name))} contain each other.")
        members = load_choice("benchmark", name).get("members")
        found += [name] if members is None else resolve_benchmarks(members, (*parents, name))
    return list(dict.fromkeys(found))


def group_keys(names: str | Iterable[str]) -> dict[str, dict[str, Any]]:
    """Keys of single benchmarks, by their names, that the named groups set for their members (`keys` in their YAMLs):
    how a table of the paper asks them, for example. A group counts more than those that are its members.

    Raises:
        UsageError: two groups ask one benchmark in different ways.
    """
    found: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    for name in _split(names):
        content = load_choice("benchmark", name)
        own = group_keys(content.get("members") or [])
        for benchmark, keys in (content.get("keys") or {}).items():
            own[benchmark] = own.get(benchmark, {}) | keys
        for benchmark, keys in own.items():
            if found.setdefault(benchmark, keys) != keys:
                raise UsageError(
                    f"{origins[benchmark]} and {name} ask {benchmark} in different ways ({found[benchmark]} and "
                    f"{keys}): score a run on one of them, then on the other with `prism-deco evaluate --out=FOLDER`."
                )
            origins[benchmark] = name
    return found


def _split(names: str | Iterable[str]) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else list(names)


def benchmark_name(choice: str) -> str:
    """The name of a benchmark that is chosen by its name or by the path of its YAML."""
    return Path(choice).stem if choice.endswith(YAML_SUFFIXES) else choice


def results_name(choice: str, split: str | None = None, ask: str = AS_TRAINED) -> str:
    """The name of a benchmark's results folder: the benchmark's, followed by the split unless it is the YAML's own, and
    by how it is asked unless that is as trained."""
    own = load_choice("benchmark", choice).get("split") or ""
    parts = [benchmark_name(choice)]
    if split not in (None, own):
        parts.append(str(split))
    if ask != AS_TRAINED:
        parts.append(ask)
    return "-".join(parts)


def resolve_asks(names: str) -> list[str]:
    """The ways to ask of `evaluate.ask`, each once, in order."""
    asks = [name.strip() for name in names.split(",") if name.strip()]
    return list(dict.fromkeys(asks)) or [AS_TRAINED]
