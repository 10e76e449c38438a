"""Tables of scores by row, projector and benchmark, beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from prism_deco.report import paper
from prism_deco.report.baselines import blind, chance, mean_scores
from prism_deco.report.benchmarks import benchmarks_of
from prism_deco.report.cells import MAXIMA, RunCell, SeedGroup, Summary, in_order, projector_rank, seed_groups
from prism_deco.report.comparability import disagreements

SECONDARY: Mapping[str, str] = {
    "f1": "f1: mean over POPE's subsets; yes is the positive class.",
    "accuracy_pad_corrected": (
        "accuracy pad corrected: boxes are read as relative to the image padded to a square, as in LLaVA's training "
        "data, and mapped back to the image before they are compared."
    ),
}
"""Metrics that are shown below the primary one, and what they mean."""


@dataclass(frozen=True)
class ScoreRow:
    """A row of a table.

    Attributes:
        group: without cells if the study has no such run.
        paper: the paper's scores by benchmark; empty if it has none.
        about: the models of the row, shown in smaller print.
        cited: the paper quotes these scores from another paper; ours are not compared with them.
    """

    row: str
    variant: str
    group: SeedGroup
    paper: Mapping[str, float]
    about: tuple[str, ...] = ()
    cited: bool = False


@dataclass(frozen=True)
class ScoreTable:
    """A table of scores.

    Attributes:
        part: of the sweep; empty if the sweep has no parts.
        table: number of the paper's table; None if the paper has no such table.
        split: of the benchmarks; "" is their own.
        chance: chance level by benchmark.
        blind: score of the image-blind baseline by row and benchmark.
        disagreements: differences that make the cells incomparable.
    """

    title: str
    part: str
    table: int | None
    rows: Sequence[ScoreRow]
    benchmarks: Sequence[str]
    split: str
    chance: Mapping[str, float]
    blind: Mapping[str, Mapping[str, float]]
    disagreements: Sequence[str]

    @property
    def groups(self) -> list[SeedGroup]:
        return [row.group for row in self.rows if row.group.cells]

    @property
    def cells(self) -> list[RunCell]:
        return [cell for group in self.groups for cell in group.cells]

    @property
    def has_mean(self) -> bool:
        """Whether a mean over benchmarks makes sense: all are percentages."""
        return len(self.benchmarks) > 1 and all(self.maximum(name) == 100 for name in self.benchmarks)

    def maximum(self, benchmark: str) -> float:
        """The highest possible score."""
        # All scores of a benchmark have the same maximum. Without scores, its name stands in for its family.
        scores = [score for group in self.groups for score in group.scores(benchmark, self.split).values()]
        return scores[0].maximum if scores else MAXIMA.get(benchmark, 100.0)

    def summary(self, group: SeedGroup, name: str) -> Summary | None:
        """The score of a group on a benchmark, or its `mean` over all."""
        return group.overall(self.benchmarks, self.split) if name == "mean" else group.summary(name, self.split)

    def ours(self, variant: str) -> dict[tuple[str, str], float | None]:
        """Our scores of a projector by row and benchmark."""
        found: dict[tuple[str, str], float | None] = {}
        for row in self.rows:
            if row.variant == variant and not row.cited:
                for name in self.benchmarks:
                    summary = row.group.summary(name, self.split)
                    found[row.row, name] = summary.mean if summary else None
        return found

    def papers(self, variant: str) -> dict[tuple[str, str], float | None]:
        """The paper's scores of a projector by row and benchmark."""
        chosen = [row for row in self.rows if row.variant == variant and row.paper and not row.cited]
        return {(row.row, name): row.paper.get(name) for row in chosen for name in self.benchmarks}


def score_tables(cells: Sequence[RunCell], split: str) -> list[ScoreTable]:
    """The paper's Tables 3 and 1 if any cell belongs to them, and a table of all other cells; in a sweep with parts,
    these tables for each part that has benchmarks."""
    blind_cells = [cell for cell in cells if cell.blind]
    tables: list[ScoreTable] = []
    for part in dict.fromkeys(cell.part for cell in cells):
        groups = _with_references(seed_groups(cell for cell in cells if cell.part == part))
        # A part without benchmarks, such as one whose results only choose settings, gets no table; a sweep without
        # parts gets one of losses.
        if groups and (not part or _benchmarks(groups, split)):
            tables += _tables_of(groups, part, blind_cells, split)
    return tables


def _with_references(groups: Sequence[SeedGroup]) -> list[SeedGroup]:
    """Adds each uncompressed model, which has no token axis, as a reference to every row of its family."""
    families = {group.row: group.family for group in groups}
    found = []
    for group in groups:
        # A row without a token axis is named like its family; the family's other rows are one number of tokens each.
        own = [row for row, family in families.items() if family == group.family and row != family]
        is_reference = group.row == group.family and not group.cells[0].compressed
        found += [replace(group, row=row) for row in own] if is_reference and own else [group]
    return in_order(found, list(families))


def _tables_of(groups: Sequence[SeedGroup], part: str, blind_cells: Sequence[RunCell], split: str) -> list[ScoreTable]:
    suffix = f": {part}" if part else ""
    tables = []
    others = list(groups)
    # Each table takes the groups that it has a setting for, and leaves the rest. Cells of a group differ only in their
    # seed, so the first one decides.
    for table in (3, 1):
        settings = [paper.setting(group.cells[0], table) for group in others]
        chosen = [(name, group) for name, group in zip(settings, others, strict=True) if name is not None]
        others = [group for name, group in zip(settings, others, strict=True) if name is None]
        if chosen:
            title = f"Table {table} of the paper, and ours{suffix}"
            rows = _paper_rows(table, chosen)
            tables.append(_table(title, part, table, rows, paper.COLUMNS[table], split, blind_cells))
    if others:
        rows = [ScoreRow(group.row, group.variant, group, {}, _about(group)) for group in others]
        benchmarks = _benchmarks(others, split)
        title = f"{'Scores' if benchmarks else 'Losses'}{suffix}"
        tables.append(_table(title, part, None, rows, benchmarks, split, blind_cells))
    return tables


def _table(
    title: str,
    part: str,
    table: int | None,
    rows: Sequence[ScoreRow],
    benchmarks: Sequence[str],
    split: str,
    blind_cells: Sequence[RunCell],
) -> ScoreTable:
    groups = [row.group for row in rows if row.group.cells]
    chances = {}
    for name in benchmarks:
        scores = [score for group in groups for score in group.scores(name, split).values()]
        # Any score will do: comparable cells were asked the same questions.
        level = chance(scores[0]) if scores else None
        if level is not None:
            chances[name] = level
    blinds = {}
    for row in dict.fromkeys(row.row for row in rows):
        own = [other.group for other in rows if other.row == row]
        members = [cell for group in own for cell in group.cells]
        # In a sweep with parts, each line may have its own chosen settings: no image-blind run matches the whole row.
        values = blind(members, blind_cells, split) or (mean_scores(blind_cells, split) if part else {})
        if values:
            blinds[row] = values
    return ScoreTable(title, part, table, rows, benchmarks, split, chances, blinds, disagreements(groups, split))


def _paper_rows(table: int, groups: Sequence[tuple[str, SeedGroup]]) -> list[ScoreRow]:
    """All rows of the paper's table and all of ours; rows of the same setting and projector become one."""
    printed = paper.rows(table)
    rows = []
    for setting in dict.fromkeys(row.setting for row in printed):
        theirs = [row for row in printed if row.setting == setting]
        about = (theirs[0].backbone, theirs[0].llm)
        for row in theirs:
            if row.cited:
                variant = f"{row.projector} (LLaVA-1.5)"
                no_runs = SeedGroup(setting, variant, ())
                rows.append(ScoreRow(setting, variant, no_runs, row.scores, about, cited=True))
        scores = {row.projector: row.scores for row in theirs if not row.cited}
        own = [group for name, group in groups if name == setting]
        # Several of our rows may belong to one setting, for example with an axis of recipes: each gets the paper's
        # numbers beside it.
        names = list(dict.fromkeys(group.row for group in own)) or [setting]
        for name in names:
            members = {group.variant: group for group in own if group.row == name}
            # What the paper printed and what was run, each once. A variant starts with its projector's name.
            variants = sorted({*scores, *members})  # variants of one projector by name
            for variant in sorted(variants, key=lambda variant: projector_rank(variant.partition(",")[0])):
                group = members.get(variant) or SeedGroup(name, variant, ())
                # A variant with settings of its own (`qformer, projector.heads=4`) stands beside its projector's
                # printed numbers.
                numbers = scores.get(group.projector if group.cells else variant, {})
                rows.append(ScoreRow(name if len(names) > 1 else setting, variant, group, numbers, about))
    return rows


def _benchmarks(groups: Sequence[SeedGroup], split: str) -> list[str]:
    return benchmarks_of([cell for group in groups for cell in group.cells], split)


def _about(group: SeedGroup) -> tuple[str, ...]:
    config = group.cells[0].config
    names = (str(config.backbone.name), str(config.llm.name)) if config is not None else ()
    return tuple(name for name in names if name not in group.row)


def score_records(table: ScoreTable) -> list[dict[str, Any]]:
    """A record per row and benchmark, for CSV."""
    found = []
    for row in table.rows:
        for name in table.benchmarks:
            summary = row.group.summary(name, table.split)
            printed = row.paper.get(name)
            low, high = summary.interval if summary else (None, None)
            found.append(
                _place(table, row, name)
                | {
                    "variant": row.group.asked_as(name, table.split) or None,
                    "score": summary.mean if summary else None,
                    "low95": low,
                    "high95": high,
                    "deviation": summary.deviation if summary else None,
                    "seeds": summary.seeds if summary else 0,
                    "planned_seeds": len(row.group.cells),
                    "missing": None if summary else row.group.missing,
                    "paper": printed,
                    "difference": summary.mean - printed if summary and printed is not None else None,
                    "chance": table.chance.get(name),
                    "blind": table.blind.get(row.row, {}).get(name),
                }
            )
    return found


def secondary_records(table: ScoreTable) -> list[dict[str, Any]]:
    """A record per row, benchmark and metric, for CSV: means over the seeds that have the metric."""
    found = []
    for row in table.rows:
        for name in table.benchmarks:
            summary = row.group.summary(name, table.split)
            scores = list(row.group.scores(name, table.split).values())
            # A metric of another variant is named `variant/metric`; other ones are of the primary's variant.
            for metric, values in secondary_values(row.group, name, table.split).items():
                found.append(
                    _place(table, row, name)
                    | {
                        "variant": metric.rpartition("/")[0] or row.group.asked_as(name, table.split) or None,
                        "metric": metric,
                        "score": fmean(values),
                        "deviation": stdev(values) if len(values) > 1 else None,
                        "seeds": len(values),
                        "planned_seeds": len(row.group.cells),
                        "primary_metric": str(scores[-1].content["primary"]),
                        "primary": summary.mean if summary else None,
                        "paper": row.paper.get(name),
                    }
                )
    return found


def secondary_values(group: SeedGroup, benchmark: str, split: str) -> dict[str, list[float]]:
    """Values over the seeds by metric, with the names, order and units of `metrics.json`.

    Secondary metrics are those of `SECONDARY`, and these and the primary one of other variants (`generate/f1`,
    `plain/accuracy`).
    """
    found: dict[str, list[float]] = {}
    for score in group.scores(benchmark, split).values():
        primary = score.content["primary"]
        for name, value in score.content["metrics"].items():
            # `variant/metric`; the parts of a metric are `metric/part`.
            if name != primary and name.rpartition("/")[2] in (primary, *SECONDARY):
                found.setdefault(name, []).append(float(value))
    return found


def _place(table: ScoreTable, row: ScoreRow, benchmark: str) -> dict[str, Any]:
    """The first columns of each CSV record."""
    return {
        "part": table.part or None,
        "table": table.table,
        "row": row.row,
        "projector": row.variant,
        "benchmark": benchmark,
        "split": table.split or None,
    }


def paper_mean(row: ScoreRow, benchmarks: Sequence[str]) -> float | None:
    """Mean of the paper's scores of a row; None unless the paper has all of them."""
    complete = benchmarks and all(name in row.paper for name in benchmarks)
    return fmean(row.paper[name] for name in benchmarks) if complete else None
