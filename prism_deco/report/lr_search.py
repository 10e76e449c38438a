"""The settings that a part of a study chooses by the results of another: the rung of a learning-rate ladder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from prism_deco.report.cells import Cell, projector_rank
from prism_deco.report.tabular import MISSING, Field, Table, number
from prism_deco.training.status import THROUGH

_CRITERION = "val/loss"


@dataclass(frozen=True)
class Ladder:
    """What a projector was tried with.

    Attributes:
        source: the part that tries.
        key: the setting that is tried.
        losses: the last `val/loss` by value of the key, ascending, mean over seeds; None where no cell has one.
        missing: by value, why there is none.
        used: values in the parts that choose; more than one if they did not all choose the same.
    """

    source: str
    key: str
    name: str
    losses: Mapping[str, float | None]
    missing: Mapping[str, str]
    used: tuple[str, ...]

    @property
    def chosen(self) -> str | None:
        """The value of the lowest loss."""
        known = {value: loss for value, loss in self.losses.items() if loss is not None and math.isfinite(loss)}
        return min(known, key=lambda value: known[value]) if known else None

    @property
    def at_edge(self) -> bool:
        """Whether the best value is the first or the last that was tried: a better one may lie beyond."""
        values = list(self.losses)
        return self.chosen is not None and self.chosen in (values[0], values[-1])


def read_ladders(sweep: Mapping[str, Any], cells: Sequence[Cell]) -> list[Ladder]:
    """The ladders of a study's projectors.

    Args:
        sweep: the content of its `sweep.yaml`, whose parts say what they choose, and from which part.
    """
    parts: Mapping[str, Any] = sweep.get("parts") or {}
    choices = {(source, key) for part in parts.values() for key, source in (part.get("choose") or {}).items()}
    found = []
    for source, key in sorted(choices):
        choosing = {name for name, part in parts.items() if (part.get("choose") or {}).get(key) == source}
        tried = [cell for cell in cells if cell.part == source]
        for name in sorted({_name(cell) for cell in tried}, key=projector_rank):
            own = [cell for cell in tried if _name(cell) == name]
            after = [cell for cell in cells if cell.part in choosing and _name(cell) == name and cell.manifest]
            found.append(_ladder(source, key, name, own, after))
    return found


def _ladder(source: str, key: str, name: str, cells: Sequence[Cell], after: Sequence[Cell]) -> Ladder:
    losses, missing = {}, {}
    for value in sorted({cell.labels.get(key, MISSING) for cell in cells}, key=_by_number):
        own = [cell for cell in cells if cell.labels.get(key, MISSING) == value]
        known = [cell.curves[_CRITERION][-1][1] for cell in own if cell.manifest and cell.curves.get(_CRITERION)]
        losses[value] = fmean(known) if known else None
        if not known:
            states = dict.fromkeys(cell.state for cell in own)
            missing[value] = "/".join("no val/loss" if state in THROUGH else state for state in states)
    used = {str(OmegaConf.select(cell.config, key)) for cell in after if cell.config is not None}
    return Ladder(source, key, name, losses, missing, tuple(sorted(used, key=_by_number)))


def records(ladders: Sequence[Ladder]) -> list[dict[str, Any]]:
    """A record per projector and value, for CSV."""
    return [
        {
            "part": ladder.source,
            "projector": ladder.name,
            "setting": ladder.key,
            "value": value,
            "val_loss": loss,
            "missing": ladder.missing.get(value),
            "chosen": value == ladder.chosen,
            "at_edge": value == ladder.chosen and ladder.at_edge,
            "used": ", ".join(ladder.used),
        }
        for ladder in ladders
        for value, loss in ladder.losses.items()
    ]


def tables(ladders: Sequence[Ladder]) -> list[Table]:
    """A table per setting that was chosen."""
    found = []
    for source, key in dict.fromkeys((ladder.source, ladder.key) for ladder in ladders):
        own = [ladder for ladder in ladders if (ladder.source, ladder.key) == (source, key)]
        values = sorted({value for ladder in own for value in ladder.losses}, key=_by_number)
        rows = [[Field(one.name), *(_field(one, value) for value in values), _used(one)] for one in own]
        caption = (
            f"val/loss after the last validation of the part {source}, in nats per token; the lowest is chosen, and "
            "bold. At the edge: the lowest one is the first or the last that was tried, a better one may lie beyond."
        )
        title = f"{key} chosen on the validation split"
        found.append(Table(title, ["projector", *values, "used"], rows, caption=caption))
    return found


def _field(ladder: Ladder, value: str) -> Field:
    loss = ladder.losses.get(value)
    if loss is None:
        return Field(ladder.missing.get(value, MISSING), muted=True)
    chosen = value == ladder.chosen
    return Field(number(loss, 4), ("at the edge",) if chosen and ladder.at_edge else (), best=chosen)


def _used(ladder: Ladder) -> Field:
    if not ladder.used:
        return Field(MISSING)
    other = ladder.used != (ladder.chosen,)
    return Field(", ".join(ladder.used), ("not the lowest",) if other else ())


def _name(cell: Cell) -> str:
    return f"{cell.variant} (blind)" if cell.blind else cell.variant


def _by_number(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return math.inf, value
