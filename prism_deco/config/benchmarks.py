"""Names of benchmarks: groups of them, and what their results are called."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

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
