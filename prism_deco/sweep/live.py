"""What one sees of a sweep: a table that follows it on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from prism_deco.sweep.expand import SweepCell
from prism_deco.sweep.ledger import Ledger, LedgerEntry
from prism_deco.sweep.outcome import progress
from prism_deco.training.status import read_status

log = logging.getLogger(__name__)

STYLES = {"done": "green", "running": "cyan", "failed": "red", "out_of_memory": "red", "preempted": "yellow"}


class LogView:
    """Logs every change of state."""

    def changed(self, entry: LedgerEntry) -> None:
        level = logging.WARNING if entry.state in ("failed", "out_of_memory") else logging.INFO
        attempt = f", attempt {entry.attempts}" if entry.state == "running" and entry.attempts > 1 else ""
        log.log(level, "%s: %s%s%s", entry.id, entry.state, attempt, f" ({entry.reason})" if entry.reason else "")

    def show(self, ledger: Ledger, cells: Mapping[str, SweepCell]) -> None:
        """Does nothing: there is no table to redraw."""


class LiveView:
    """The table of the sweep, redrawn in place."""

    def __init__(self, live: Live):
        self._live = live

    def changed(self, entry: LedgerEntry) -> None:
        """Does nothing: `show` redraws the whole table."""

    def show(self, ledger: Ledger, cells: Mapping[str, SweepCell]) -> None:
        self._live.update(render(ledger, cells), refresh=True)


def live_on(console: Console) -> Live:
    """The live display for `LiveView`; it redraws when told to, no thread of its own runs."""
    return Live(console=console, auto_refresh=False)


def render(ledger: Ledger, cells: Mapping[str, SweepCell] | None = None) -> Table:
    """The ledger as a table.

    Args:
        cells: the cells that are being run, for their progress and the time left.
    """
    states = Counter(entry.state for entry in ledger.entries.values())
    title = f"{ledger.name}: " + ", ".join(f"{number} {state}" for state, number in states.items())
    left = None if cells is None else seconds_left(ledger, cells)
    caption = None if left is None else f"about {duration(left)} left"
    # Names and reasons are no markup: they may hold brackets.
    table = Table(title=Text(title, "table.title"), caption=caption, title_justify="left")
    table.add_column("cell", no_wrap=True)
    table.add_column("state")
    table.add_column("tries", justify="right")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("progress", justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for entry in ledger.entries.values():
        style = STYLES.get(entry.state, "dim")
        spent = entry.seconds
        if entry.state == "running" and entry.started is not None:
            spent += time.time() - entry.started
        table.add_row(
            Text(entry.id),
            Text(entry.state, style),
            str(entry.attempts),
            duration(spent) if spent else "",
            _progress_text(ledger, entry, cells),
            Text(entry.reason or ""),
        )
    return table


def seconds_left(ledger: Ledger, cells: Mapping[str, SweepCell]) -> float | None:
    """The time that the sweep still takes; None as long as nothing is known to judge by.

    A running cell is extrapolated from its own steps, every other one takes the mean of those that are known, and
    as many run side by side as do now.
    """
    totals: list[float] = []
    running: list[tuple[float, float | None]] = []
    waiting = 0
    for name, cell in cells.items():
        entry = ledger.entries[name]
        if entry.state == "done":
            totals.append(entry.seconds)
        elif entry.state == "running" and entry.started is not None:
            elapsed = entry.seconds + time.time() - entry.started
            fraction = _fraction(ledger, cell)
            running.append((elapsed, elapsed / fraction if fraction else None))
        elif entry.state in ("planned", "preempted"):
            waiting += 1
    totals += [total for _, total in running if total is not None]
    if not totals or not running:
        return None
    mean = sum(totals) / len(totals)
    rest = sum(max(0.0, (mean if total is None else total) - elapsed) for elapsed, total in running)
    return (rest + waiting * mean) / len(running)


def duration(seconds: float) -> str:
    """`75` -> `1:15`, `4000` -> `1:06:40`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _fraction(ledger: Ledger, cell: SweepCell) -> float | None:
    steps = progress(ledger.folder / cell.id, cell.config.recipe.max_steps)
    return steps[0] / steps[1] if steps and steps[1] else None


def _progress_text(ledger: Ledger, entry: LedgerEntry, cells: Mapping[str, SweepCell] | None) -> str:
    if entry.state in ("planned", "done"):
        return ""
    run = ledger.folder / entry.id
    if entry.state == "running" and read_status(run).get("state") == "trained":
        return "scoring"
    cell = (cells or {}).get(entry.id)
    steps = progress(run, cell.config.recipe.max_steps if cell else None)
    if steps is None:
        return ""
    return f"step {steps[0]}/{steps[1]}" if steps[1] else f"step {steps[0]}"
