"""Tables of what became of the cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from prism_deco.report.cells import Cell
from prism_deco.report.tabular import MISSING, Field, Table, number

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
    caption = (
        "lm: what was trained of the LLM. start from: the run whose projector was taken over. lr, projector lr: peak "
        "learning rates of what was trained of the LLM (its adapters under LoRA), and of the projector."
    )
    return Table("Cells", columns, rows, heads=9, caption=caption)


def records(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A record per cell, for CSV."""
    return [dict(zip(_COLUMNS, _values(cell), strict=True)) for cell in cells]


_MANIFEST = ("steps", "samples", "bad_images", "code_version")
_COLUMNS = ("cell", "state", "row", "projector", "seed", "recipe", "data", "lm", "start_from", "lr", "projector_lr")
_COLUMNS += ("visual_tokens", "trained_parameters", *_MANIFEST, "data_hash", "step_seconds", "seconds")


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
        *_learning(config),
        cell.tokens,
        manifest["params"]["trained"] if manifest else None,
        *(manifest.get(name) for name in _MANIFEST),
        manifest["data_hash"][:12] if manifest else None,
        number(time, 3) if time is not None else None,
        cell.seconds,
    ]


def _learning(config: DictConfig | None) -> list[Any]:
    """What is trained of the LLM, the name of the run that was started from, and the learning rates."""
    if config is None:
        return [None] * 4
    lm, start, lr, own = (config.recipe.get(key) for key in ("lm", "start_from", "lr", "projector_lr"))
    return [lm, Path(start).name if start else None, lr, lr if own is None else own]
