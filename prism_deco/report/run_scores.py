"""What every single run scored, for CSV: from it all means, intervals and tests of a report can be computed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prism_deco.explain.gae import DEFAULT_METHOD
from prism_deco.report.cells import Cell


def records(cells: Sequence[Cell], split: str) -> list[dict[str, Any]]:
    """A record per run and measure: the last validation loss of a run that is through (nats per token), primary metrics
    of benchmarks (in their own units) and mean numbers of the maps of relevance (shares of one, or of the grid's side).
    """
    found = []
    for cell in cells:
        about = {"cell": cell.id, "part": cell.part or None, "row": cell.row, "projector": cell.variant}
        about |= {"blind": cell.blind, "seed": cell.seed}
        if cell.manifest and (curve := cell.curves.get("val/loss")):
            found.append(about | {"split": "val", "measure": "val/loss", "value": curve[-1][1]})
        values = {name: score.value for name, score in cell.scores.get(split, {}).items()}
        maps = cell.relevance.get("methods", {}).get(DEFAULT_METHOD, {})
        values |= {f"relevance {key}": value["mean"] for key, value in maps.items() if isinstance(value, dict)}
        found += [about | {"split": split or None, "measure": name, "value": value} for name, value in values.items()]
    return found
