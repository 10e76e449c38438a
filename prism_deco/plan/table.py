"""Plans as a table for terminals, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from prism_deco.plan.devices import GIB
from prism_deco.plan.estimate import Needs, RunEstimate, problems

SOURCES = {
    "measured": "Lengths: from the data's records and the LLM's tokenizer",
    "words": "Lengths: from the words of the data's records, as no tokenizer is here",
    "estimate": "Lengths: an estimate, see `statistics` in the data's YAML",
}


def table(plans: Sequence[RunEstimate], mfu: float) -> Table:
    """One row per run; problems and warnings below."""
    first = next((plan.needs for plan in plans if plan.needs is not None), None)
    kind = plans[0].accelerator
    on = f"{first.setup.devices if first else 1} x {kind} at {mfu:.0%} of its peak" if kind else "on this machine's CPU"
    result = Table(
        title=f"Plan: {on}",
        caption=Text("\n".join(_notes(plans)), "table.caption"),  # no markup: brackets may be those of a path
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    result.add_column("run", overflow="fold")
    columns = (
        "params\n(trained)", "visual\ntokens", "sequence\nmean/longest/max", "text\ncut", "GiB per\ndevice",
        "PFLOP", "hours", "checkpoints\nGiB", "",
    )  # fmt: skip
    for column in columns:
        result.add_column(column, justify="right", no_wrap=True)
    for plan in plans:
        cells = [""] * (len(columns) - 1) if plan.needs is None else _cells(plan.needs)
        result.add_row(Text(plan.name), *cells, "[red]no[/]" if problems(plan) else "[green]ok[/]")
    return result


def _cells(needs: Needs) -> list[str]:
    memory = needs.memory
    return [
        f"{_count(needs.parameters)} ({_count(needs.trained)})",
        f"{needs.visual_in}>{needs.visual_out}",
        f"{needs.sequence:.0f}/{needs.longest}/{needs.positions}",
        "?" if needs.cut is None else f"{needs.cut:.1%}",
        _gib(memory.peak),
        f"{needs.flops / 1e15:,.0f}" if needs.flops > 1e16 else f"{needs.flops / 1e15:.2g}",
        "?" if needs.hours is None else f"{needs.hours:.1f}",
        _gib(needs.checkpoint * needs.checkpoints_kept),
    ]


def _notes(plans: Sequence[RunEstimate]) -> list[str]:
    notes = [
        "Memory is that of tensors in the forward pass of the longest record; --json has its parts. Hours are without",
        "validation and scoring. On disk: the checkpoints kept.",
    ]
    policies = sorted({plan.needs.setup.checkpointing for plan in plans if plan.needs is not None} - {"none"})
    for policy in policies:
        names = [plan.name for plan in plans if plan.needs is not None and plan.needs.setup.checkpointing == policy]
        notes.append(f"Activations recomputed ({policy}): {', '.join(names) if len(names) < len(plans) else 'all'}")
    sources = {plan.needs.source for plan in plans if plan.needs is not None}
    notes += [text for source, text in SOURCES.items() if source in sources]
    said: dict[str, list[str]] = {}
    for plan in plans:
        for text in (*problems(plan), *(f"{warning} (warning)" for warning in plan.warnings)):
            said.setdefault(text, []).append(plan.name)
    return notes + [f"{', '.join(names) if len(names) < len(plans) else 'all'}: {text}" for text, names in said.items()]


def as_json(plans: Sequence[RunEstimate]) -> list[dict[str, Any]]:
    """The plans with all their parts, bytes and operations as plain numbers."""
    result = []
    for plan in plans:
        content: dict[str, Any] = asdict(plan) | {"problems": problems(plan)}
        if plan.needs is not None:
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
