"""Results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text


def table(
    results: Sequence[Mapping[str, Any]],
    chance: Mapping[str, float] | None = None,
    blind: Mapping[str, float] | None = None,
) -> Table:
    """One row per benchmark.

    Args:
        results: contents of `metrics.json` files.
        chance: score of the best constant answer by benchmark (see `scoring.chance`).
        blind: score of a trained image-blind model by benchmark; None leaves the column out.
    """
    grid = Table("benchmark", "metric")
    numbers = ["n", "score", "95 % interval", "chance", "blind", "invalid"]
    for name in numbers if blind is not None else [name for name in numbers if name != "blind"]:
        grid.add_column(name, justify="right")
    for result in results:
        name = result["benchmark"]
        low, high = result["interval95"]
        grid.add_row(
            Text(name),
            result["primary"],
            str(result["n"]),
            f"{result['metrics'][result['primary']]:.1f}",
            f"{low:.1f} to {high:.1f}",
            _cell(chance, name),
            *([_cell(blind, name)] if blind is not None else []),
            f"{result['invalid_rate']:.1%}",
        )
    return grid


def _cell(values: Mapping[str, float] | None, name: str) -> str:
    return f"{values[name]:.1f}" if values is not None and name in values else "-"
