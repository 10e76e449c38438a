"""Tables of what became of the cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from prism_deco.report.layout import MISSING, Field, Table, number
from prism_deco.report.study import Cell

_MEANING = {"trained": "scoring is outstanding"}


def unfinished(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that are not trained and scored to the end."""
    return [cell for cell in cells if cell.state != "done"]


def progress(cells: Sequence[Cell]) -> str:
    """How many cells are in which state, in words."""
    states = Counter(cell.state for cell in cells)
    if not states:
        return "There are no cells."
    others = [f"{count} {state}" for state, count in states.items() if state != "done"]
    return ", ".join([f"{states['done']} of {len(cells)} cells done", *others]) + "."


def states(cells: Sequence[Cell]) -> Table:
    """The unfinished cells with the reason; their last log lines stand beside the table."""
    rows = [
        [
            Field(cell.id),
            Field(cell.state),
            Field(MISSING if cell.attempts is None else str(cell.attempts)),
            Field(cell.reason or _MEANING.get(cell.state, MISSING)),
        ]
        for cell in unfinished(cells)
    ]
    return Table("Unfinished cells", ["cell", "state", "attempts", "reason"], rows, heads=4)


def cells_table(cells: Sequence[Cell]) -> Table:
    """Every cell with what it was trained on."""
    rows = [[Field(MISSING if value is None else str(value)) for value in one.values()] for one in records(cells)]
    columns = [name.replace("_", " ") for name in _COLUMNS]
    return Table("Cells", columns, rows, heads=7)


def records(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A record per cell, for CSV."""
    return [dict(zip(_COLUMNS, _values(cell), strict=True)) for cell in cells]


_MANIFEST = ("steps", "samples", "bad_images", "code_version")
_COLUMNS = ("cell", "state", "row", "projector", "seed", "recipe", "data", "visual_tokens", "trained_parameters")
_COLUMNS += (*_MANIFEST, "data_hash", "step_seconds", "seconds")


def _values(cell: Cell) -> list[Any]:
    manifest, config, time = cell.manifest, cell.config, cell.step_seconds
    return [
        cell.id,
        cell.state,
        cell.row,
        f"{cell.variant} (blind)" if cell.blind else cell.variant,
        cell.seed,
        str(config.recipe.name) if config is not None else None,
        str(config.data.name) if config is not None else None,
        cell.tokens,
        manifest["params"]["trained"] if manifest else None,
        *(manifest.get(name) for name in _MANIFEST),
        manifest["data_hash"][:12] if manifest else None,
        number(time, 3) if time is not None else None,
        cell.seconds,
    ]
