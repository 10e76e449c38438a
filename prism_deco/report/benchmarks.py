"""Which benchmarks a study is about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

from prism_deco.config import CONF_DIR, load_choice
from prism_deco.report import paper
from prism_deco.report.study import Cell


def benchmarks_of(cells: Sequence[Cell], split: str) -> list[str]:
    """The benchmarks that were scored or are to be, in the order of the paper's and the miniature's columns."""
    scored = (name for cell in cells for name in cell.scores.get(split, {}))
    return _in_order([*asked_of(cells), *scored])


def asked_of(cells: Iterable[Cell]) -> list[str]:
    """The benchmarks that the cells were to be scored on when they were planned."""
    asked = (str(cell.config.evaluate.benchmarks or "") for cell in cells if cell.config is not None)
    return _in_order(name for names in asked for part in names.split(",") for name in _expand(part.strip()))


def _in_order(names: Iterable[str]) -> list[str]:
    order = [*paper.COLUMNS[1], *_expand("mini")]
    known = dict.fromkeys(names)
    return sorted(known, key=lambda name: (order.index(name) if name in order else len(order), name))


@cache
def _expand(name: str) -> tuple[str, ...]:
    """The members of a group of benchmarks; a single one is itself, an unknown one too: it is missing, not wrong."""
    if not (CONF_DIR / "benchmark" / f"{name}.yaml").is_file():
        return (name,) if name else ()
    members = load_choice("benchmark", name).get("members")
    return tuple(leaf for member in members for leaf in _expand(member)) if members is not None else (name,)
