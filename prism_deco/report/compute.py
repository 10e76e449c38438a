"""What the trainings of a study cost in arithmetic, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from prism_deco.report.cells import Cell, Entry
from prism_deco.report.tabular import MISSING, Field, Table, number

TOLERANCE = 0.01
"""Relative difference of two trainings' arithmetic that still counts as equal: steps are whole."""


def is_equal(cells: Iterable[Cell]) -> bool | None:
    """Whether the trainings cost the same; None where one of them is not known."""
    costs = [cell.flops for cell in cells]
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs) or not known:
        return None
    return max(known) <= (1 + TOLERANCE) * min(known)


def budgets(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """A record per entry that has a finished cell: steps and arithmetic."""
    found = []
    for entry in entries:
        cell = next((cell for cell in entry.cells if cell.manifest), None)
        if cell is None:
            continue
        flops, steps = cell.flops, cell.manifest["steps"]
        found.append(
            {
                "part": cell.part,
                "row": entry.row,
                "projector": entry.variant,
                "visual_tokens": entry.tokens,
                "steps": steps,
                "samples": cell.manifest["samples"],
                "gflop_per_step": flops / steps / 1e9 if flops is not None else None,
                "tflop": flops / 1e12 if flops is not None else None,
            }
        )
    return found


def table(records: Sequence[dict[str, Any]]) -> Table:
    """The records of `budgets`."""
    rows, starts = [], set()
    for position, record in enumerate(records):
        first = position == 0 or records[position - 1]["part"] != record["part"]
        if first:
            starts.add(position)
        rows.append(
            [
                Field(record["part"] if first else ""),
                Field(record["projector"]),
                Field(record["row"]),
                Field(str(record["visual_tokens"] or MISSING)),
                Field(f"{record['steps']:,}"),
                Field(f"{record['samples']:,}"),
                Field(number(record["gflop_per_step"], 2)),
                Field(number(record["tflop"], 2)),
            ]
        )
    columns = ["part", "projector", "row", "tokens", "steps", "samples", "GFLOP per step", "TFLOP in all"]
    caption = (
        "Training's matrix products and convolutions, forward and backward, as prism-deco plan counts them, with the "
        "towers in every step even where their features were cached; validation and scoring are not part of it."
    )
    return Table("Steps and arithmetic", columns, rows, heads=3, caption=caption, starts=frozenset(starts))
