"""What a study's parts were given: the settings that they chose by the results of another part, and their compute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from prism_deco.report.cells import RunCell, SeedGroup, projector_rank
from prism_deco.report.comparability import training_flops
from prism_deco.training.progress import THROUGH

_CRITERION = "val/loss"

SEARCH_CAPTION = (
    "val_loss: after the last validation, in nats per token; the lowest is chosen. At the edge: it is the first or the "
    "last value that was tried, a better one may lie beyond. used: in the parts that choose by it."
)
COMPUTE_CAPTION = (
    "Training's matrix products and convolutions, forward and backward, as prism-deco plan counts them, with the "
    "towers in every step even where their features were cached; without validation and scoring."
)


def search_records(sweep: Mapping[str, Any], cells: Sequence[RunCell]) -> list[dict[str, Any]]:
    """A record per projector and value that was tried.

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
            used = {str(OmegaConf.select(cell.config, key)) for cell in after if cell.config is not None}
            about = {"part": source, "projector": name, "setting": key}
            for record in _tried(own, key):
                records.append(about | record | {"used": ", ".join(sorted(used, key=_by_number))})
    return records


def _tried(cells: Sequence[RunCell], key: str) -> list[dict[str, Any]]:
    """A record per value of the key, ascending."""
    values = sorted({cell.labels.get(key, "-") for cell in cells}, key=_by_number)
    losses: dict[str, float | None] = {}
    missing: dict[str, str] = {}
    for value in values:
        own = [cell for cell in cells if cell.labels.get(key, "-") == value]
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


def compute_records(groups: Sequence[SeedGroup]) -> list[dict[str, Any]]:
    """A record of steps and compute for each group with a finished cell."""
    found = []
    for group in groups:
        cell = next((cell for cell in group.cells if cell.manifest), None)
        if cell is None:
            continue
        flops = training_flops(cell)
        steps = cell.manifest["steps"]
        found.append(
            {
                "part": cell.part,
                "row": group.row,
                "projector": group.variant,
                "visual_tokens": group.tokens,
                "steps": steps,
                "samples": cell.manifest["samples"],
                "gflop_per_step": flops / steps / 1e9 if flops is not None else None,
                "tflop": flops / 1e12 if flops is not None else None,
            }
        )
    return found
