"""The benchmarks of a study, and their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from omegaconf import DictConfig

from prism_deco.config import load_choice
from prism_deco.config.choices import choice_name, resolve_benchmarks
from prism_deco.errors import UsageError
from prism_deco.report import paper
from prism_deco.report.cells import RunCell


def benchmarks_of(cells: Sequence[RunCell], split: str) -> list[str]:
    """The benchmarks of some cells, planned or scored on this split: those of the paper and the miniature in the order
    of their columns, then the others by name."""
    names = {name for cell in cells for name in (*cell.asked, *cell.scores.get(split, {}))}
    order = [*paper.COLUMNS[1], *_members("mini")]
    # Names outside the order share one place behind it, and are sorted by name there.
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def asked_by(config: DictConfig) -> dict[str, str]:
    """The benchmarks that a run is to be scored on: their choices (shipped names, or YAML files) by name."""
    choices: list[str] = []
    for part in str(config.evaluate.benchmarks or "").split(","):
        choices += _members(part.strip())
    return {str(_content(choice)["name"]): choice for choice in choices}


@cache
def _members(choice: str) -> list[str]:
    """The members of a group of benchmarks. An unknown name counts as a benchmark without scores."""
    try:
        return resolve_benchmarks(choice)
    except UsageError:
        return [choice]


def family_of(choice: str) -> str:
    """The family of a benchmark; empty if it is unknown."""
    return str(_content(choice).get("family") or "")


@cache
def _content(choice: str) -> Mapping[str, Any]:
    """A benchmark's YAML; only its name if the file no longer exists."""
    try:
        return load_choice("benchmark", choice)
    except UsageError:
        return {"name": choice_name(choice)}
