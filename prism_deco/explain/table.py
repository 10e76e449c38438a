"""Compares runs by the measures of their maps."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions
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
"""Headings of the measures, the most important first."""
_NAME_WIDTH = 20


class MapTable:
    """One row per run and method; the last measures are omitted if the terminal is too narrow.

    Args:
        runs: contents of `metrics.json`.
    """

    def __init__(self, runs: Sequence[Mapping[str, Any]]):
        self._runs = runs

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        measures = list(_COLUMNS)
        unlimited = options.update(width=10_000)
        while len(measures) > 1:
            if console.measure(self._table(measures), options=unlimited).minimum <= options.max_width:
                break
            measures.pop()
        yield self._table(measures)

    def _table(self, measures: Sequence[str]) -> Table:
        made = Table(
            title="Text-to-Patch maps: means, and half of their 95 % intervals", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        made.add_column("run, projector", no_wrap=True)
        made.add_column("map")
        for measure in measures:
            made.add_column(_COLUMNS[measure], justify="right")
        for run in self._runs:
            for number, (method, values) in enumerate(run["methods"].items()):
                # rich would not break a run's name; wrap it at its hyphens.
                names = [*textwrap.wrap(run["run"], _NAME_WIDTH), run["projector"]] if number == 0 else []
                made.add_row(Text("\n".join(names)), method, *(_cell(values.get(name)) for name in measures))
            made.add_section()
        made.caption = self._caption([name for name in _COLUMNS if name not in measures])
        return made

    def _caption(self, left_out: Sequence[str]) -> str:
        counts = sorted({int(run["n"]) for run in self._runs})
        too_narrow = (
            f"Terminal too narrow for {', '.join(left_out)}: metrics.json has all columns. " if left_out else ""
        )
        return (
            f"{too_narrow}{' or '.join(map(str, counts))} examples per run; {', '.join(METHODS)} against random maps. "
            "Redundancy and spread (locality) are those of the visual tokens' own maps."
        )


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    low, high = value["interval95"]
    return f"{value['mean']:.3f} ±{(high - low) / 2:.3f}"
