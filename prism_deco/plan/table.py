"""Plans as a terminal table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from prism_deco.plan.devices import GIB
from prism_deco.plan.estimate import Needs, RunEstimate, problems

SOURCES = {
    "measured": "Lengths: from the data's records and the LLM's tokenizer",
    "words": "Lengths: from word counts of the data's records (no tokenizer available)",
    "estimate": "Lengths: an estimate, see `statistics` in the data's YAML",
}

COLUMNS = {
    "memory": "GiB per\ndevice",
    "hours": "hours",
    "parameters": "params\n(trained)",
    "visual tokens": "visual\ntokens",
    "checkpoints": "checkpoints\nGiB",
    "sequence": "sequence\nmean/longest/max",
    "PFLOP": "PFLOP",
    "text cut": "text\ncut",
}
"""Columns between a run's name and its verdict, the most important ones first."""


@dataclass(frozen=True)
class PlanTable:
    """One row per run; notes, problems and warnings below.

    A narrow terminal gets the most important columns only. Nothing is truncated; names wider than the terminal fold.
    """

    plans: Sequence[RunEstimate]
    mfu: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        columns = list(COLUMNS)
        # Leave out the least important columns until the width that the rest needs fits.
        unlimited = options.update(width=10_000)
        while columns and console.measure(self._table(columns), options=unlimited).maximum > options.max_width:
            columns.pop()
        yield self._table(columns)
        left_out = [column for column in COLUMNS if column not in columns]
        notes = [f"Terminal too narrow for {', '.join(left_out)}: --json has all columns."] if left_out else []
        # Text, not markup: paths may contain brackets.
        yield Text("\n".join([*notes, *_notes(self.plans)]), "table.caption")

    def _table(self, columns: Sequence[str]) -> Table:
        result = Table(title=self._title(), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        result.add_column("run", overflow="fold")
        for heading in (*(COLUMNS[column] for column in columns), ""):
            result.add_column(heading, justify="right", no_wrap=True)
        for plan in self.plans:
            cells = {} if plan.needs is None else _cells(plan.needs)
            verdict = "[red]no[/]" if problems(plan) else "[green]ok[/]"
            result.add_row(Text(plan.name), *(cells.get(column, "") for column in columns), verdict)
        return result

    def _title(self) -> str:
        kind = self.plans[0].accelerator
        if kind is None:
            return "Plan: on this machine's CPU"
        devices = next((plan.needs.setup.devices for plan in self.plans if plan.needs is not None), 1)
        return f"Plan: {devices} x {kind} at {self.mfu:.0%} of its peak"


def _cells(needs: Needs) -> dict[str, str]:
    petaflops = needs.flops / 1e15
    return {
        "memory": _gib(needs.memory.peak),
        "hours": "?" if needs.hours is None else f"{needs.hours:.1f}",
        "parameters": f"{_count(needs.parameters)} ({_count(needs.trained)})",
        "visual tokens": f"{needs.visual_in}>{needs.visual_out}",
        "checkpoints": _gib(needs.checkpoint * needs.checkpoints_kept),
        "sequence": f"{needs.sequence:.0f}/{needs.longest}/{needs.positions}",
        "PFLOP": f"{petaflops:,.0f}" if petaflops > 10 else f"{petaflops:.2g}",
        "text cut": "?" if needs.cut is None else f"{needs.cut:.1%}",
    }


def _notes(plans: Sequence[RunEstimate]) -> list[str]:
    notes = [
        "Memory is the peak of tensors in a step with the longest record; --json has its parts. Hours are without "
        "validation and scoring. Checkpoints are all that are kept."
    ]
    # Grouped by text, so that a note about several runs appears once, with their names.
    names: dict[str, list[str]] = {}
    for plan in plans:
        if plan.needs is not None and plan.needs.setup.checkpointing != "none":
            names.setdefault(f"Activations recomputed ({plan.needs.setup.checkpointing})", []).append(plan.name)
    notes += [f"{text}: {_listed(found, plans)}" for text, found in names.items()]
    sources = {plan.needs.source for plan in plans if plan.needs is not None}
    notes += [text for source, text in SOURCES.items() if source in sources]
    names = {}
    for plan in plans:
        for text in (*problems(plan), *(f"{warning} (warning)" for warning in plan.warnings)):
            names.setdefault(text, []).append(plan.name)
    return notes + [f"{_listed(found, plans)}: {text}" for text, found in names.items()]


def _listed(names: Sequence[str], plans: Sequence[RunEstimate]) -> str:
    return ", ".join(names) if len(names) < len(plans) else "all"


def as_json(plans: Sequence[RunEstimate]) -> list[dict[str, Any]]:
    """The plans with all details; bytes and operations are plain numbers."""
    result = []
    for plan in plans:
        content: dict[str, Any] = asdict(plan) | {"problems": problems(plan)}
        if plan.needs is not None:
            # A property, which `asdict` leaves out.
            content["needs"]["memory"]["peak"] = plan.needs.memory.peak
        result.append(content)
    return result


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number / 1e3:.0f}K"


def _gib(size: float) -> str:
    return f"{size / GIB:.2g}" if size < 10 * GIB else f"{size / GIB:,.0f}"
