"""The compute of a study's trainings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from prism_deco.report.cells import RunCell, SeedGroup

TOLERANCE = 0.01
"""Relative difference in compute of two trainings that still counts as equal: steps are whole."""

CAPTION = (
    "Training's matrix products and convolutions, forward and backward, as prism-deco plan counts them, with the "
    "towers in every step even where their features were cached; without validation and scoring."
)


def same_compute(cells: Iterable[RunCell]) -> bool | None:
    """Whether the trainings had the same compute; None where it is not known of one of them."""
    costs = [cell.flops for cell in cells]
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs) or not known:
        return None
    return max(known) <= (1 + TOLERANCE) * min(known)


def compute_records(groups: Sequence[SeedGroup]) -> list[dict[str, Any]]:
    """A record of steps and compute for each group with a finished cell."""
    found = []
    for group in groups:
        cell = next((cell for cell in group.cells if cell.manifest), None)
        if cell is None:
            continue
        flops, steps = cell.flops, cell.manifest["steps"]
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
