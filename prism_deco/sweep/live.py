"""The ledger as a table, redrawn in place while a sweep runs in a terminal."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from rich.table import Table
from rich.text import Text

from prism_deco.sweep.expand import SweepCell
from prism_deco.sweep.ledger import Ledger, LedgerEntry
from prism_deco.sweep.outcome import tail
from prism_deco.training.progress import read_status

STYLES = {"done": "green", "running": "cyan", "failed": "red", "out_of_memory": "red", "preempted": "yellow"}


def render(ledger: Ledger, cells: Mapping[str, SweepCell] | None = None) -> Table:
    """The ledger as a table.

    Args:
        cells: the cells of the running driver, for their progress and the time left.
    """
    states = Counter(entry.state for entry in ledger.entries.values())
    title = f"{ledger.name}: " + ", ".join(f"{number} {state}" for state, number in states.items())
    left = seconds_left([ledger.entries[name] for name in cells or ()])
    caption = None if left is None else f"about {duration(left)} left"
    # `Text`, since names and reasons may contain brackets, which rich would read as markup.
    table = Table(title=Text(title, "table.title"), caption=caption, title_justify="left")
    table.add_column("cell", no_wrap=True)
    table.add_column("state")
    table.add_column("tries", justify="right")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("progress", justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for entry in ledger.entries.values():
        spent = _seconds(entry)
        table.add_row(
            Text(entry.id),
            Text(entry.state, STYLES.get(entry.state, "dim")),
            str(entry.attempts),
            duration(spent) if spent else "",
            _progress(ledger.folder / entry.id, entry, (cells or {}).get(entry.id)),
            Text(entry.reason or ""),
        )
    return table


def seconds_left(entries: list[LedgerEntry]) -> float | None:
    """Remaining time, if each cell takes as long as the mean of those that are done and as many run in parallel as
    now; None while none is done or none is running."""
    done = [entry.seconds for entry in entries if entry.state == "done"]
    running = [_seconds(entry) for entry in entries if entry.state == "running"]
    waiting = sum(entry.state in ("planned", "preempted") for entry in entries)
    if not done or not running:
        return None
    mean = fmean(done)
    # A running cell that takes longer than the mean is about to end: it counts as nothing, not as negative time.
    rest = sum(max(0.0, mean - elapsed) for elapsed in running)
    return (rest + waiting * mean) / len(running)


def duration(seconds: float) -> str:
    """`75` -> `1:15`, `4000` -> `1:06:40`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def last_step(run: Path) -> int | None:
    """Number of optimizer steps, from the last line of `metrics.jsonl`; None if it is unknown."""
    for line in reversed(tail(run / "metrics.jsonl").splitlines()):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # the last line may be half written
    return None


def _seconds(entry: LedgerEntry) -> float:
    """Time spent on a cell, including the running attempt."""
    if entry.state != "running" or entry.started is None:
        return entry.seconds
    return entry.seconds + time.time() - entry.started


def _progress(run: Path, entry: LedgerEntry, cell: SweepCell | None) -> str:
    if entry.state in ("planned", "done"):
        return ""
    if entry.state == "running" and read_status(run).get("state") == "trained":
        return "scoring"
    step = last_step(run)
    if step is None:
        return ""
    total = cell.config.recipe.max_steps if cell else None
    return f"step {step}/{total}" if total else f"step {step}"
