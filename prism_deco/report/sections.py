"""The report's sections: claims and how they were tested, and tables of scores with their figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prism_deco.report import (
    budget,
    claim_report,
    compute,
    curve_figures,
    forest_plot,
    lr_search,
    readings,
    recipe_diff,
    score_figures,
    tables,
)
from prism_deco.report.contrasts import Result
from prism_deco.report.grid import Grid
from prism_deco.report.html_page import Section
from prism_deco.report.lr_search import Ladder
from prism_deco.report.paired_tests import BASE, Difference
from prism_deco.report.plotting import Figure


def of_claims(results: Sequence[Result]) -> list[Section]:
    """What became of the claims, and the contrasts behind it; none where nothing was claimed."""
    if not results:
        return []
    return [
        Section([claim_report.summary(results)], forest_plot.forests(results)),
        Section([claim_report.contrasts(results)]),
    ]


def of_settings(ladders: Sequence[Ladder], costs: Sequence[dict[str, Any]]) -> list[Section]:
    """How the parts of a study were set: what they chose, and what their training cost.

    Args:
        costs: of `compute.budgets`.
    """
    shown = [*lr_search.tables(ladders), *([compute.table(costs)] if costs else [])]
    return [Section([table]) for table in shown]


def of_grids(grids: Sequence[Grid], found: Sequence[Sequence[Difference]]) -> list[Section]:
    """Tables of scores, or of losses where nothing was scored, what follows from each, and its figures.

    Args:
        found: differences by grid.
    """
    sections = []
    for grid, own in zip(grids, found, strict=True):
        # A figure of many numbers of tokens spans the tables of a part, and stands below the last of them.
        scored = [other for other in grids if other.part == grid.part and other.benchmarks]
        figures = []
        if scored and grid is scored[-1]:
            figures = score_figures.ablation(grid, [entry for other in scored[:-1] for entry in other.entries])
        sections.append(_of_grid(grid, own, figures))
    return sections


def _of_grid(grid: Grid, found: Sequence[Difference], ablation: Sequence[Figure]) -> Section:
    if not grid.benchmarks:
        curves = curve_figures.convergence(grid)
        return Section([tables.losses(grid)], [curves] if curves else [], grid.disagreements)
    shown = [tables.scores(grid, found), readings.table(grid), tables.wins(grid)]
    if grid.table == 1:
        shown += [tables.gains(grid), tables.spatial(grid)]
    first = [pair for pair in found if BASE in (pair.first, pair.second)] or found
    rest = [pair for pair in found if pair not in first]
    shown += [tables.differences(first) if first else None, budget.budget(grid)]
    drawn = [curve_figures.convergence(grid), *ablation]
    drawn += [score_figures.pareto(grid, cost) for cost in budget.COSTS]
    drawn.append(score_figures.forest(grid, first))
    folded = [tables.differences(rest, title="Differences of the other pairs")] if rest else []
    return Section(
        tables=[table for table in shown if table is not None],
        figures=[figure for figure in drawn if figure is not None],
        warnings=grid.disagreements,
        departures=recipe_diff.sentences(cell for entry in grid.entries for cell in entry.cells) if grid.table else [],
        folded=folded,
    )
