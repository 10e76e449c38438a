"""Settings that parts of a study choose by the results of another: a learning-rate search on the validation split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from prism_deco.report.cells import RunCell, projector_rank
from prism_deco.report.tabular import MISSING
from prism_deco.training.status import THROUGH

_CRITERION = "val/loss"

CAPTION = (
    "val_loss: after the last validation, in nats per token; the lowest is chosen. At the edge: it is the first or the "
    "last value that was tried, a better one may lie beyond. used: in the parts that choose by it."
)


def search_records(sweep: Mapping[str, Any], cells: Sequence[RunCell]) -> list[dict[str, Any]]:
    """A record per projector and value that was tried, for CSV.

    A record holds the last `val/loss`, mean over seeds, or why there is none; whether it is the lowest, and at the
    edge of what was tried; and the values in the parts that choose, more than one if they did not all choose the same.

    Args:
        sweep: the content of its `sweep.yaml`, whose parts say what they choose, and from which part.
    """
    choosing: dict[tuple[str, str], set[str]] = {}
    for name, part in (sweep.get("parts") or {}).items():
        for key, source in (part.get("choose") or {}).items():
            choosing.setdefault((source, key), set()).add(name)
    records = []
    for (source, key), parts in sorted(choosing.items()):
        tried = [cell for cell in cells if cell.part == source]
        for name in sorted({_name(cell) for cell in tried}, key=projector_rank):
            own = [cell for cell in tried if _name(cell) == name]
            after = [cell for cell in cells if cell.part in parts and _name(cell) == name and cell.manifest]
            about = {"part": source, "projector": name, "setting": key}
            used = {str(OmegaConf.select(cell.config, key)) for cell in after if cell.config is not None}
            records += [
                about | record | {"used": ", ".join(sorted(used, key=_by_number))} for record in _tried(own, key)
            ]
    return records


def _tried(cells: Sequence[RunCell], key: str) -> list[dict[str, Any]]:
    """A record per value of the key, ascending."""
    values = sorted({cell.labels.get(key, MISSING) for cell in cells}, key=_by_number)
    losses: dict[str, float | None] = {}
    missing: dict[str, str] = {}
    for value in values:
        own = [cell for cell in cells if cell.labels.get(key, MISSING) == value]
        known = [cell.curves[_CRITERION][-1][1] for cell in own if cell.manifest and cell.curves.get(_CRITERION)]
        losses[value] = fmean(known) if known else None
        if not known:
            states = dict.fromkeys(cell.state for cell in own)
            missing[value] = "/".join("no val/loss" if state in THROUGH else state for state in states)
    finite = {value: loss for value, loss in losses.items() if loss is not None and math.isfinite(loss)}
    chosen = min(finite, key=lambda value: finite[value]) if finite else None
    return [
        {
            "value": value,
            "val_loss": losses[value],
            "missing": missing.get(value),
            "chosen": value == chosen,
            "at_edge": value == chosen and value in (values[0], values[-1]),
        }
        for value in values
    ]


def _name(cell: RunCell) -> str:
    return f"{cell.variant} (blind)" if cell.blind else cell.variant


def _by_number(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return math.inf, value
