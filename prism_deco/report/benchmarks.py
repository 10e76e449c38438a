"""Which benchmarks a study is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from omegaconf import DictConfig

from prism_deco.config import load_choice
from prism_deco.errors import UsageError
from prism_deco.report import paper
from prism_deco.report.cells import Cell


def benchmarks_of(cells: Sequence[Cell], split: str) -> list[str]:
    """The benchmarks that were scored or are to be, in the order of the paper's and the miniature's columns."""
    scored = (name for cell in cells for name in cell.scores.get(split, {}))
    return _in_order([*asked_of(cells), *scored])


def asked_of(cells: Iterable[Cell]) -> list[str]:
    """The benchmarks that the cells were to be scored on when they were planned."""
    return _in_order(name for cell in cells for name in cell.asked)


def asked_by(config: DictConfig) -> Mapping[str, str]:
    """By name, the choices (shipped names, or YAML files) of the benchmarks that a run is to be scored on."""
    names = str(config.evaluate.benchmarks or "").split(",")
    return {leaf: choice for name in names for leaf, choice in expand(name.strip()).items()}


def families_of(cells: Iterable[Cell], benchmarks: Iterable[str]) -> dict[str, str]:
    """The families of benchmarks that the cells were asked, by name."""
    choices = {name: choice for cell in cells for name, choice in cell.asked.items()}
    return {name: family_of(choices.get(name, name)) for name in benchmarks}


def family_of(choice: str) -> str:
    """The family of a benchmark; empty where that is not known."""
    return str(_content(choice).get("family") or "")


@cache
def expand(choice: str) -> Mapping[str, str]:
    """The members of a group of benchmarks, by name; a single one is itself, an unknown one too: it is missing, not
    wrong."""
    content = _content(choice)
    if "members" not in content:
        return {str(content["name"]): choice} if choice else {}
    return {leaf: its for member in content["members"] for leaf, its in expand(member).items()}


@cache
def _content(choice: str) -> Mapping[str, str]:
    """A benchmark's YAML; of one that is not there only the name."""
    try:
        return load_choice("benchmark", choice)
    except UsageError:
        return {"name": Path(choice).stem if choice.endswith((".yaml", ".yml")) else choice}


def _in_order(names: Iterable[str]) -> list[str]:
    order = [*paper.COLUMNS[1], *expand("mini")]
    known = dict.fromkeys(names)
    return sorted(known, key=lambda name: (order.index(name) if name in order else len(order), name))
