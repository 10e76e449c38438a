"""From folders to the report's files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prism_deco.report import budget, curve_figures, score_figures, states, tables
from prism_deco.report.collect import collect
from prism_deco.report.fair import refusal
from prism_deco.report.grid import Grid, build_grids, records
from prism_deco.report.layout import Table, comma_separated, escape, markdown
from prism_deco.report.page import Report, Section, render
from prism_deco.report.pairs import BASE, Difference, differences
from prism_deco.report.study import Cell
from prism_deco.report.style import Figure

log = logging.getLogger(__name__)

OWN_SPLIT = "own"


def write_report(
    folders: Sequence[Path], out: Path | None = None, *, split: str | None = None, mixed: bool = False
) -> tuple[Path, list[Table]]:
    """Writes `report.html`, `report.md` with its `figures/`, and `scores.csv`, `differences.csv` and `cells.csv`.

    Args:
        folders: sweep folders or run folders.
        out: folder to write to; `report` in the one sweep's folder, else beside the first run.
        split: of the benchmarks: `own` or a name (`test`); by default the benchmarks' own if they were scored on it.
        mixed: put cells into one table though they saw different data, steps, questions or seeds.

    Returns:
        the page, and the tables of scores.

    Raises:
        ValueError: a folder is no run's or sweep's; cells do not compare (see `fair.disagreements`).
    """
    cells = collect(folders)
    out = out or _default_out(folders)
    chosen, others = _choose_split(cells, split)
    grids = build_grids(cells, chosen)
    for grid in grids:
        if grid.disagreements and not mixed:
            raise ValueError(refusal(grid.title, grid.disagreements))
    log.info("Comparing %d cells", len(cells))
    pairs = [differences(grid.entries, grid.benchmarks, chosen) for grid in grids]
    sections = [_section(grid, found) for grid, found in zip(grids, pairs, strict=True)]
    curves = [figure for cell in cells if (figure := curve_figures.cell_curves(cell)) is not None]
    report = Report(
        title=_title(folders),
        progress=states.progress(cells),
        notes=_notes(cells, chosen, others),
        unfinished=states.states(cells) if states.unfinished(cells) else None,
        logs=[(cell.id, cell.log_tail) for cell in states.unfinished(cells) if cell.log_tail],
        sections=sections,
        curves=curves,
        cells=states.cells_table(cells) if cells else None,
    )
    files: dict[str, str | bytes] = {
        "report.html": render(report),
        "report.md": _markdown(report),
        "scores.csv": comma_separated([record for grid in grids for record in records(grid)]),
        "differences.csv": comma_separated([_record(pair) for found in pairs for pair in found]),
        "cells.csv": comma_separated(states.records(cells)),
        **{f"figures/{name}.svg": figure.svg for name, figure in _named(report)},
    }
    for name, content in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return out / "report.html", [section.tables[0] for section in sections]


def _title(folders: Sequence[Path]) -> str:
    first, others = folders[0].resolve().name, len(folders) - 1
    return first if not others else f"{first} and {others} {'other' if others == 1 else 'others'}"


def _default_out(folders: Sequence[Path]) -> Path:
    first = folders[0]
    is_sweep = len(folders) == 1 and not (first / "config.yaml").is_file()
    return first / "report" if is_sweep else first.resolve().parent / "report"


def _choose_split(cells: Sequence[Cell], split: str | None) -> tuple[str, list[str]]:
    """The split to show ("" is the benchmarks' own) and the others that were scored."""
    known = sorted({name for cell in cells for name in cell.scores})
    chosen = "" if split == OWN_SPLIT else split
    if chosen is None:
        chosen = known[0] if known else ""  # the benchmarks' own sorts first
    if known and chosen not in known:
        names = ", ".join(name or OWN_SPLIT for name in known)
        raise ValueError(f"No cell was scored on the split {split!r}. Scored splits: {names}.")
    return chosen, [name or OWN_SPLIT for name in known if name != chosen]


def _notes(cells: Sequence[Cell], split: str, others: Sequence[str]) -> list[str]:
    if not cells:
        return ["Nothing was planned or run here yet: start with prism-deco sweep or prism-deco train."]
    notes = [f"Split: {split or 'the benchmarks’ own'}."]  # noqa: RUF001
    if others:
        notes.append(f"Also scored: {', '.join(others)} (--split).")
    machines = {str(cell.manifest.get("machine")) for cell in cells if cell.manifest}
    if len(machines) > 1:
        notes.append(f"The cells were trained on {len(machines)} kinds of machine: their times do not compare.")
    return notes


def _section(grid: Grid, found: Sequence[Difference]) -> Section:
    shown = [tables.scores(grid), tables.wins(grid)]
    if grid.table == 1:
        shown += [tables.gains(grid), tables.spatial(grid)]
    first = [pair for pair in found if BASE in (pair.first, pair.second)] or found
    rest = [pair for pair in found if pair not in first]
    shown += [tables.differences(first) if first else None, budget.budget(grid)]
    drawn = [curve_figures.convergence(grid), *score_figures.ablation(grid)]
    drawn += [score_figures.pareto(grid, cost) for cost in budget.COSTS]
    drawn.append(score_figures.forest(grid, first))
    folded = [tables.differences(rest, title="Differences of the other pairs")] if rest else []
    return Section(
        title=grid.title,
        tables=[table for table in shown if table is not None],
        figures=[figure for figure in drawn if figure is not None],
        warnings=grid.disagreements,
        folded=folded,
    )


def _record(pair: Difference) -> dict[str, Any]:
    values = asdict(pair)
    for name in ("interval", "over_seeds"):
        low, high = values.pop(name) or (None, None)
        values |= {f"{name}_low95": low, f"{name}_high95": high}
    return values


def _named(report: Report) -> list[tuple[str, Figure]]:
    """All figures with the names of their files."""
    several = len(report.sections) > 1
    named = [
        (f"{number}-{figure.name}" if several else figure.name, figure)
        for number, section in enumerate(report.sections, start=1)
        for figure in section.figures
    ]
    return named + [(figure.name, figure) for figure in report.curves]


def _markdown(report: Report) -> str:
    names = {id(figure): name for name, figure in _named(report)}

    def pictures(drawn: Sequence[Figure]) -> list[str]:
        return [f"![{escape(one.caption or one.name)}](<figures/{names[id(one)]}.svg>)\n" for one in drawn]

    parts = [f"# {escape(report.title)}\n", escape(" ".join([report.progress, *report.notes])) + "\n"]
    if report.unfinished:
        parts.append(markdown(report.unfinished))
        for name, text in report.logs:
            quoted = "\n".join(f"    {line}" for line in text.splitlines())
            parts.append(f"Last log lines of {escape(name)}:\n\n{quoted}\n")
    for section in report.sections:
        parts.append(f"## {escape(section.title)}\n")
        parts += [f"**Not comparable:** {escape(warning)}\n" for warning in section.warnings]
        parts += [markdown(table) for table in (*section.tables, *section.folded)]
        parts += pictures(section.figures)
    if report.curves:
        parts += ["## Curves of single cells\n", *pictures(report.curves)]
    if report.cells:
        parts.append(markdown(report.cells))
    return "\n".join(parts)
