"""The result of a benchmark: one row per compared implementation, as a table and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from prism_deco.bench.measure import Usage
from prism_deco.errors import UsageError
from prism_deco.files import write_json


@dataclass(frozen=True)
class BenchRow:
    """One of the compared implementations.

    Attributes:
        name: for the table.
        taken: the usage of each run.
        facts: other results.
    """

    name: str
    taken: Sequence[Usage]
    facts: dict[str, Any] = field(default_factory=dict)

    def times(self, clock: str = "seconds") -> list[float]:
        """Seconds of each run, by `seconds` (wall-clock) or `cpu_seconds`."""
        return [getattr(usage, clock) for usage in self.taken]


@dataclass(frozen=True)
class BenchResult:
    """All compared implementations.

    Attributes:
        columns: header -> function from a row to its cell; the rows' names come first.
        about: settings and hardware.
    """

    rows: list[BenchRow]
    title: str
    caption: str
    columns: Mapping[str, Callable[[BenchRow], str]]
    about: dict[str, Any] = field(default_factory=dict)

    def table(self) -> Table:
        """One line per row."""
        table = Table(title=Text(self.title, "table.title"), caption=self.caption)
        table.add_column("")
        for header in self.columns:
            table.add_column(header, justify="right")
        for row in self.rows:
            table.add_row(row.name, *(cell(row) for cell in self.columns.values()))
        return table

    def write(self, path: Path) -> None:
        """Writes the numbers as JSON."""
        rows = []
        for row in self.rows:
            times = {clock: row.times(clock) for clock in ("seconds", "cpu_seconds")}
            rows.append({"name": row.name} | row.facts | times)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.about | {"rows": rows})


def interleaved(runs: Mapping[str, Callable[[], Usage]], *, repeats: int, warmup: int = 1) -> dict[str, list[Usage]]:
    """Alternates between the runs, so that a change in the machine's speed affects all of them.

    Args:
        repeats: timed rounds, at least 2.
        warmup: rounds before them.
    """
    if repeats < 2:
        raise UsageError(f"repeats={repeats} shows no spread: use 2 or more.")
    taken: dict[str, list[Usage]] = {name: [] for name in runs}
    # Negative rounds are the warm-up.
    for repeat in range(-warmup, repeats):
        for name, run in runs.items():
            usage = run()
            if repeat >= 0:
                taken[name].append(usage)
    return taken


def spread(values: Sequence[float], digits: int) -> str:
    """Median ± interquartile range."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.{digits}f} ± {upper - lower:.{digits}f}"
