"""Runs side by side in the numbers of their maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from prism_deco.explain.gae import METHODS

_COLUMNS = {
    "energy_in_box": "energy in box ↑",
    "pointing": "pointing ↑",
    "deletion_auc": "deletion AUC ↓",
    "insertion_auc": "insertion AUC ↑",
    "query_redundancy": "redundancy ↓",
    "query_spread": "spread ↓",
}


def table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """One line per run and method.

    Args:
        runs: contents of `metrics.json`.
    """
    made = Table(title="Text-to-Patch maps: means, and half of their 95 % intervals")
    for heading in ("run", "projector", "map", *_COLUMNS.values()):
        made.add_column(heading, overflow="fold", justify="right" if heading in _COLUMNS.values() else "left")
    for run in runs:
        for number, (method, values) in enumerate(run["methods"].items()):
            names = [Text(run["run"]), Text(run["projector"])] if number == 0 else ["", ""]
            made.add_row(*names, method, *(_cell(values.get(name)) for name in _COLUMNS))
        made.add_section()
    counts = sorted({int(run["n"]) for run in runs})
    made.caption = (
        f"{' or '.join(map(str, counts))} examples per run; {', '.join(METHODS)} against random maps. Redundancy and "
        "spread (locality) are those of the visual tokens' own maps."
    )
    return made


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    low, high = value["interval95"]
    return f"{value['mean']:.3f} ±{(high - low) / 2:.3f}"
