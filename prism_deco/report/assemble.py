"""From folders to the report's files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prism_deco.config.registry import import_plugins
from prism_deco.errors import UsageError
from prism_deco.report import (
    claim_report,
    claim_text,
    compute,
    curve_figures,
    lr_search,
    readings,
    run_scores,
    sections,
    status_tables,
)
from prism_deco.report.benchmarks import asked_of
from prism_deco.report.cells import Cell
from prism_deco.report.collect import collect
from prism_deco.report.comparability import refusal
from prism_deco.report.contrasts import Result, evaluate
from prism_deco.report.document import document, named
from prism_deco.report.grid import build_grids, records
from prism_deco.report.html_page import Report, render
from prism_deco.report.hypotheses import parse, read_sweep
from prism_deco.report.paired_tests import Difference, differences
from prism_deco.report.tabular import Table, comma_separated

log = logging.getLogger(__name__)

OWN_SPLIT = "own"

MOST_CURVES = 40
"""Above that many cells, single curves are drawn of unfinished cells only."""


def write_report(
    folders: Sequence[Path], out: Path | None = None, *, split: str | None = None, mixed: bool = False
) -> tuple[Path, list[Table]]:
    """Writes `report.html`, `report.md` with its `figures/`, and `scores.csv`, `run_scores.csv`, `differences.csv` and
    `cells.csv`; `readings.csv` where benchmarks have second numbers; of a sweep with parts `ladder.csv` and
    `compute.csv` too, and of one with claims `claims.csv` and `claims.md`.

    Args:
        folders: sweep folders or run folders.
        out: folder to write to; `report` in the one sweep's folder, else beside the first run.
        split: of the benchmarks: `own` or a name (`test`); by default the benchmarks' own if they were scored on it.
        mixed: put cells into one table though they saw different data, steps, questions or seeds.

    Returns:
        the page, and the tables of claims and scores.

    Raises:
        UsageError: a folder is no run's or sweep's; cells do not compare (see `fair.disagreements`); claims that
            cannot be read.
    """
    cells = collect(folders)
    _import_plugins(cells)
    out = out or _default_out(folders)
    chosen, others = _choose_split(cells, split)
    # Claims are about one study; several side by side are tables only.
    sweep: Mapping[str, Any] = read_sweep(folders[0]) if len(folders) == 1 else {}
    results = _results(sweep, cells, chosen)
    ladders = lr_search.read_ladders(sweep, cells)
    grids = build_grids(cells, chosen)
    for grid in grids:
        if grid.disagreements and not mixed:
            raise UsageError(refusal(grid.title, grid.disagreements))
    log.info("Comparing %d cells", len(cells))
    pairs = [differences(grid.entries, grid.benchmarks, chosen) for grid in grids]
    costs = compute.budgets([entry for grid in grids if grid.part for entry in grid.entries])
    claimed = sections.of_claims(results)
    scored = sections.of_grids(grids, pairs)
    curves = [figure for cell in _drawn(cells) if (figure := curve_figures.cell_curves(cell)) is not None]
    report = Report(
        title=_title(folders),
        progress=status_tables.progress(cells),
        notes=_notes(cells, chosen, others),
        unfinished=status_tables.states(cells) if status_tables.unfinished(cells) else None,
        logs=[(cell.id, cell.log_tail) for cell in status_tables.unfinished(cells) if cell.log_tail],
        sections=[*claimed, *sections.of_settings(ladders, costs), *scored],
        curves=curves,
        cells=status_tables.cells_table(cells) if cells else None,
    )
    files: dict[str, str | bytes] = {
        "report.html": render(report),
        "report.md": document(report),
        "scores.csv": comma_separated([record for grid in grids for record in records(grid)]),
        "differences.csv": comma_separated([_record(pair) for found in pairs for pair in found]),
        "cells.csv": comma_separated(status_tables.records(cells)),
        "run_scores.csv": comma_separated(run_scores.records(cells, chosen)),
        **{f"figures/{name}.svg": figure.svg for name, figure in named(report)},
    }
    if second := [record for grid in grids for record in readings.records(grid)]:
        files["readings.csv"] = comma_separated(second)
    if results:
        files["claims.csv"] = comma_separated(claim_report.records(results))
        files["claims.md"] = claim_text.text(report.title, results, cells, chosen)
    if ladders:
        files["ladder.csv"] = comma_separated(lr_search.records(ladders))
    if costs:
        files["compute.csv"] = comma_separated(costs)
    for name, content in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return out / "report.html", [section.tables[0] for section in (*claimed[:1], *scored)]


def _import_plugins(cells: Sequence[Cell]) -> None:
    """Imports what the runs' benchmarks may be registered by; where that is not there, they are not compared."""
    configs = (cell.config for cell in cells if cell.config is not None)
    for module in dict.fromkeys(module for config in configs for module in config.get("plugins") or ()):
        try:
            import_plugins([module])
        except UsageError as error:
            log.warning("%s", error)


def _results(sweep: Mapping[str, Any], cells: Sequence[Cell], split: str) -> list[Result]:
    claims = parse(sweep.get("claims") or [])
    return evaluate(claims, cells, asked_of(cells), split)


def _drawn(cells: Sequence[Cell]) -> Sequence[Cell]:
    return cells if len(cells) <= MOST_CURVES else status_tables.unfinished(cells)


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
        raise UsageError(f"No cell was scored on the split {split!r}. Scored splits: {names}.")
    return chosen, [name or OWN_SPLIT for name in known if name != chosen]


def _notes(cells: Sequence[Cell], split: str, others: Sequence[str]) -> list[str]:
    if not cells:
        return ["Nothing was planned or run here yet: start with prism-deco sweep or prism-deco train."]
    notes = [f"Split: {split or 'the benchmarks’ own'}."]  # noqa: RUF001
    if others:
        notes.append(f"Also scored: {', '.join(others)} (--split).")
    if len(cells) > MOST_CURVES:
        notes.append("Single curves are those of unfinished cells.")
    machines = {str(cell.manifest.get("machine")) for cell in cells if cell.manifest}
    if len(machines) > 1:
        notes.append(f"The cells were trained on {len(machines)} kinds of machine: their times do not compare.")
    return notes


def _record(pair: Difference) -> dict[str, Any]:
    values = asdict(pair)
    for name in ("interval", "over_seeds"):
        low, high = values.pop(name) or (None, None)
        values |= {f"{name}_low95": low, f"{name}_high95": high}
    return values
