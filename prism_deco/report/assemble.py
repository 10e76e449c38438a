"""From folders to the report's files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_deco.config.registry import require_imported
from prism_deco.errors import UsageError
from prism_deco.report import (
    claim_report,
    compute,
    curve_figures,
    grid,
    lr_search,
    score_figures,
    secondary_metrics,
    status_tables,
    tables,
)
from prism_deco.report.benchmarks import benchmarks_of
from prism_deco.report.cells import RunCell
from prism_deco.report.collect import collect
from prism_deco.report.comparability import refusal
from prism_deco.report.contrasts import contrast_records
from prism_deco.report.document import PageSection, about, document, notes
from prism_deco.report.forest_plot import forests
from prism_deco.report.grid import ScoreTable
from prism_deco.report.html_page import render
from prism_deco.report.hypotheses import Claim, parse_claims, read_sweep
from prism_deco.report.paired_tests import BASE, Difference, difference_records, paired_differences
from prism_deco.report.plotting import Figure
from prism_deco.report.recipe_diff import override_sentences
from prism_deco.report.tabular import Table, comma_separated, records_table

log = logging.getLogger(__name__)

OWN_SPLIT = "own"


def write_report(
    folders: Sequence[Path], out: Path | None = None, *, split: str | None = None, mixed: bool = False
) -> tuple[Path, list[Table]]:
    """Writes `report.html`, `report.md` with its `figures/`, and `scores.csv`, `run_scores.csv`, `differences.csv` and
    `cells.csv`; `readings.csv` where benchmarks have secondary metrics; of a sweep with parts `ladder.csv` and
    `compute.csv` too, and of one with claims `claims.csv`.

    Args:
        folders: sweep folders or run folders.
        out: folder to write to; by default `report` in the sweep's folder, or next to the first run.
        split: of the benchmarks: `own` or a name (`test`); by default the benchmarks' own if they were scored on it.
        mixed: put cells into one table though they saw different data, steps, questions or seeds.

    Returns:
        the page, and the tables of claims and scores.

    Raises:
        UsageError: a folder is not a run's or a sweep's; cells do not compare (see `comparability`); claims that
            cannot be read.
    """
    cells = collect(folders)
    _warn_of_plugins(cells)
    out = out or _default_out(folders)
    chosen, others = _choose_split(cells, split)
    # Claims are about one study; several side by side are tables only.
    sweep: Mapping[str, Any] = read_sweep(folders[0]) if len(folders) == 1 else {}
    claims = parse_claims(sweep.get("claims") or [])
    contrasts = contrast_records(claims, cells, benchmarks_of(cells, None), chosen)
    searches = lr_search.search_records(sweep, cells)
    score_tables = grid.score_tables(cells, chosen)
    for table in score_tables:
        if table.disagreements and not mixed:
            raise UsageError(refusal(table.title, table.disagreements))
    differences = []
    for table in score_tables:
        log.info("%s: comparing %d lines on %d benchmarks", table.title, len(table.groups), len(table.benchmarks))
        differences.append(paired_differences(table.groups, table.benchmarks, chosen, table.has_mean))
    of_parts = [table for table in score_tables if table.part]
    costs = compute.compute_records([group for table in of_parts for group in table.groups])
    log.info("Drawing the figures")
    claimed = _claim_sections(claims, contrasts)
    scored = _score_sections(score_tables, differences)
    settings = []
    if searches:
        settings.append(
            records_table("Settings chosen on the validation split", searches, lr_search.CAPTION, "projector")
        )
    if costs:
        settings.append(records_table("Steps and compute", costs, compute.CAPTION, "part"))
    sections = [*claimed, *(PageSection([table]) for table in settings), *scored]
    paragraphs = [*about(cells), notes(cells, chosen, others)]
    text, figures = document(_title(folders), paragraphs, cells, sections)
    files: dict[str, str | bytes] = {
        "report.html": render(text, figures),
        "report.md": text,
        "scores.csv": comma_separated([record for table in score_tables for record in grid.score_records(table)]),
        "differences.csv": comma_separated([record for own in differences for record in difference_records(own)]),
        "cells.csv": comma_separated(status_tables.cell_records(cells)),
        "run_scores.csv": comma_separated(status_tables.run_records(cells, chosen)),
        **figures,
    }
    secondary = [record for table in score_tables for record in secondary_metrics.secondary_records(table)]
    optional = {
        "readings.csv": secondary,
        "claims.csv": contrasts,
        "ladder.csv": searches,
        "compute.csv": costs,
    }
    files |= {name: comma_separated(records) for name, records in optional.items() if records}
    for name, content in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return out / "report.html", [section.tables[0] for section in (*claimed[:1], *scored)]


def _warn_of_plugins(cells: Sequence[RunCell]) -> None:
    """Says which plug-ins nobody has imported: the benchmarks that they register are not compared."""
    plugins = {tuple(cell.config.get("plugins") or ()): cell for cell in cells if cell.config is not None}
    for modules, cell in plugins.items():
        try:
            require_imported(modules, cell.folder / "config.yaml")
        except UsageError as error:
            log.warning("%s", error)


def _default_out(folders: Sequence[Path]) -> Path:
    first = folders[0]
    is_sweep = len(folders) == 1 and not (first / "config.yaml").is_file()
    return first / "report" if is_sweep else first.resolve().parent / "report"


def _choose_split(cells: Sequence[RunCell], split: str | None) -> tuple[str, list[str]]:
    """The split to show ("" is the benchmarks' own) and the others that were scored."""
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


def _claim_sections(claims: Sequence[Claim], contrasts: Sequence[Mapping[str, Any]]) -> list[PageSection]:
    """What became of the claims, and the contrasts behind it; none where nothing was claimed."""
    if not contrasts:
        return []
    return [
        PageSection([claim_report.claims_table(claims, contrasts)], forests(contrasts), notes=[claim_report.SCOPE]),
        PageSection([claim_report.contrasts_table(contrasts)]),
    ]


def _score_sections(
    score_tables: Sequence[ScoreTable], differences: Sequence[Sequence[Difference]]
) -> list[PageSection]:
    """Tables of scores, or of losses where nothing was scored, what follows from each, and its figures."""
    sections = []
    for table, own in zip(score_tables, differences, strict=True):
        # A figure of many numbers of tokens spans the tables of a part, and stands below the last of them.
        scored = [other for other in score_tables if other.part == table.part and other.benchmarks]
        figures = []
        if scored and table is scored[-1]:
            more = [group for other in scored[:-1] for group in other.groups]
            figures = score_figures.tokens_figures(table, more)
        sections.append(_score_section(table, own, figures))
    return sections


def _score_section(
    table: ScoreTable, differences: Sequence[Difference], tokens_figures: Sequence[Figure]
) -> PageSection:
    curves = curve_figures.convergence(table)
    warnings = [f"Not comparable: {line}" for line in table.disagreements]
    if not table.benchmarks:
        return PageSection([tables.losses_table(table)], [curves] if curves else [], warnings)
    with_base = [pair for pair in differences if BASE in (pair.first, pair.second)] or differences
    rest = [pair for pair in differences if pair not in with_base]
    shown = [
        tables.scores_table(table, differences),
        tables.wins_table(table),
        *([tables.gains_table(table), tables.spatial_table(table)] if table.table == 1 else []),
        tables.differences_table(with_base) if with_base else None,
        score_figures.budget_table(table),
    ]
    figures = [
        curves,
        *tokens_figures,
        *(score_figures.cost_figure(table, cost) for cost in score_figures.COSTS),
        score_figures.differences_figure(table, with_base),
    ]
    if table.table:
        cells = [cell for group in table.groups for cell in group.cells]
        warnings += [f"Other settings: {line}" for line in override_sentences(cells)]
    return PageSection(
        tables=[one for one in shown if one is not None],
        figures=[figure for figure in figures if figure is not None],
        warnings=warnings,
        folded=[tables.differences_table(rest, title="Differences of the other pairs")] if rest else [],
    )
