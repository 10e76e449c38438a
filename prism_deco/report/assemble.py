"""Writes a report about run and sweep folders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prism_deco.config.registry import require_imported
from prism_deco.errors import UsageError
from prism_deco.files import check_writable, refusals_named
from prism_deco.report import figures, grid, status_tables, tables
from prism_deco.report.cells import RunCell
from prism_deco.report.collect import collect
from prism_deco.report.comparability import refusal
from prism_deco.report.grid import ScoreTable
from prism_deco.report.page import PageSection, document, render
from prism_deco.report.paired_tests import BASE, Difference, difference_records, paired_differences
from prism_deco.report.plotting import Figure
from prism_deco.report.recipe_diff import settings_records, settings_table
from prism_deco.report.tabular import Table, comma_separated

log = logging.getLogger(__name__)

OWN_SPLIT = "own"

_LONG = 100
"""Longest table of differences that is shown unfolded: a longer one would push the figures far down the page."""


def write_report(
    folders: Sequence[Path], out: Path | None = None, *, split: str | None = None, mixed: bool = False
) -> tuple[Path, list[Table]]:
    """Writes `report.html`, `report.md` with its `figures/`, and `scores.csv`, `run_scores.csv`, `differences.csv` and
    `cells.csv`; also `readings.csv` if benchmarks have secondary metrics, and `settings.csv` if cells of the paper's
    tables differ from the authors' settings.

    Args:
        folders: sweep folders or run folders.
        out: output folder; by default `report` in the sweep folder, or next to the first run.
        split: benchmark split to show, `own` or a name such as `test`; by default `own` if anything was scored on it.
        mixed: allow a table of cells with different data, steps, questions or seeds.

    Returns:
        The path of the page, and the score tables.

    Raises:
        UsageError: a folder is neither a run nor a sweep, or the cells are not comparable (see `comparability`).
    """
    out = out or _default_out(folders)
    check_writable(out, "Name another folder with --out.")
    cells = collect(folders)
    _warn_of_plugins(cells)
    chosen, others = choose_split(cells, split)
    score_tables = grid.score_tables(cells, chosen)
    # Refused before the comparisons are computed and anything is written.
    for table in score_tables:
        if table.disagreements and not mixed:
            raise UsageError(refusal(table.title, table.disagreements))
    differences = [_differences(table) for table in score_tables]
    log.info("Drawing the figures")
    scored = score_sections(score_tables, differences)
    sections = []
    unfinished = [cell for cell in cells if cell.state != "done"]
    if unfinished:
        logs = {cell.id: cell.log_tail for cell in unfinished if cell.log_tail}
        sections.append(PageSection([status_tables.unfinished_table(unfinished)], logs=logs))
    sections += scored
    if cells:
        sections.append(PageSection([status_tables.cells_table(cells)]))
    paragraphs = [*status_tables.about(cells), status_tables.notes(cells, chosen, others)]
    text, drawn = document(_title(folders), paragraphs, sections)
    files = {"report.html": render(text, drawn), "report.md": text} | drawn
    for name, content in (files | _csv_files(cells, score_tables, differences, chosen)).items():
        path = out / name
        with refusals_named(path, "Name another folder with --out.", "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return out / "report.html", [section.tables[0] for section in scored]


def _differences(table: ScoreTable) -> list[Difference]:
    log.info("%s: comparing %d rows on %d benchmarks", table.title, len(table.groups), len(table.benchmarks))
    return paired_differences(table.groups, table.benchmarks, table.split, table.has_mean)


def _csv_files(
    cells: Sequence[RunCell],
    score_tables: Sequence[ScoreTable],
    differences: Sequence[Sequence[Difference]],
    split: str,
) -> dict[str, str | bytes]:
    """The content of each CSV file, by its name."""
    records: dict[str, list[dict[str, Any]]] = {
        "scores.csv": [record for table in score_tables for record in grid.score_records(table)],
        "differences.csv": [record for own in differences for record in difference_records(own)],
        "cells.csv": [status_tables.cell_record(cell) for cell in cells],
        "run_scores.csv": status_tables.run_records(cells, split),
        "readings.csv": [record for table in score_tables for record in grid.secondary_records(table)],
        "settings.csv": [],
    }
    for table in score_tables:
        if table.table:
            records["settings.csv"] += settings_records(table.cells, table.table)
    optional = ("readings.csv", "settings.csv")
    return {name: comma_separated(own) for name, own in records.items() if own or name not in optional}


def _warn_of_plugins(cells: Sequence[RunCell]) -> None:
    """Warns about plug-ins that are not imported: the benchmarks they register cannot be compared."""
    # One cell for each list of modules, so that each list is warned about once.
    plugins = {tuple(cell.config.get("plugins") or ()): cell for cell in cells if cell.config is not None}
    for modules, cell in plugins.items():
        try:
            require_imported(modules, cell.folder / "config.yaml")
        except UsageError as error:
            log.warning("%s", error)


def _default_out(folders: Sequence[Path]) -> Path:
    first = folders[0]
    # A run folder has a config.yaml, a sweep folder has none: the report of runs goes next to the first one.
    is_sweep = len(folders) == 1 and not (first / "config.yaml").is_file()
    return first / "report" if is_sweep else first.resolve().parent / "report"


def choose_split(cells: Sequence[RunCell], split: str | None) -> tuple[str, list[str]]:
    """The split to show ("" is the benchmarks' own), and the other scored ones; `UsageError` if it was not scored."""
    known = sorted({name for cell in cells for name in cell.scores})
    chosen = "" if split == OWN_SPLIT else split
    if chosen is None:
        chosen = known[0] if known else ""  # the benchmarks' own sorts first
    if known and chosen not in known:
        names = ", ".join(name or OWN_SPLIT for name in known)
        raise UsageError(f"No cell was scored on the split {split!r}. Scored splits: {names}.")
    return chosen, [name or OWN_SPLIT for name in known if name != chosen]


def _title(folders: Sequence[Path]) -> str:
    first = folders[0].resolve().name
    others = len(folders) - 1
    return first if not others else f"{first} and {others} {'other' if others == 1 else 'others'}"


def score_sections(
    score_tables: Sequence[ScoreTable], differences: Sequence[Sequence[Difference]]
) -> list[PageSection]:
    """A section per table of scores (of losses if nothing was scored), with its statistics and figures."""
    sections = []
    for table, own in zip(score_tables, differences, strict=True):
        # The tokens figures cover all tables of a part, and go below its last one.
        scored = [other for other in score_tables if other.part == table.part and other.benchmarks]
        spanning = []
        if scored and table is scored[-1]:
            more = [group for other in scored[:-1] for group in other.groups]
            spanning = figures.tokens_figures(table, more)
        sections.append(_score_section(table, own, spanning))
    return sections


def _score_section(table: ScoreTable, differences: Sequence[Difference], spanning: Sequence[Figure]) -> PageSection:
    curves = figures.convergence(table)
    warnings = [f"Not comparable: {line}" for line in table.disagreements]
    if not table.benchmarks:
        return PageSection([tables.losses_table(table)], [curves] if curves else [], warnings)
    # Pairs with the base projector are shown and the others folded; without a base projector, all are shown.
    with_base = [pair for pair in differences if BASE in (pair.first, pair.second)] or differences
    rest = [pair for pair in differences if pair not in with_base]
    folded = [tables.differences_table(rest, title="Differences of the other pairs")] if rest else []
    if len(with_base) > _LONG:
        # Too long to be shown: folded too, above the other pairs.
        folded.insert(0, tables.differences_table(with_base))
    shown = [
        tables.scores_table(table, differences),
        tables.worth_table(table, differences),
        tables.wins_table(table),
        *([tables.gains_table(table), tables.spatial_table(table)] if table.table == 1 else []),
        tables.differences_table(with_base) if 0 < len(with_base) <= _LONG else None,
        figures.budget_table(table),
    ]
    drawn = [*(figures.mean_figure(table, cost) for cost in figures.COSTS), *spanning, curves]
    if table.table:
        shown.append(settings_table(table.cells, table.table))
    return PageSection(
        tables=[one for one in shown if one is not None],
        figures=[figure for figure in drawn if figure is not None],
        warnings=warnings,
        folded=folded,
    )
