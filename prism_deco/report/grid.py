"""Scores by row, projector and benchmark, beside the paper's where it has them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from prism_deco.report import paper
from prism_deco.report.baselines import blind, chance, mean_scores
from prism_deco.report.benchmarks import benchmarks_of
from prism_deco.report.cells import MAXIMA, Cell, Entry, Summary, group, projector_rank
from prism_deco.report.comparability import disagreements


@dataclass(frozen=True)
class Line:
    """A line of a grid.

    Attributes:
        entry: None where the study has no such cell.
        paper: the paper's scores by benchmark; empty where it has none.
        about: what the row is, in smaller print.
        cited: a line of the paper that ours are not measured against.
    """

    row: str
    variant: str
    entry: Entry | None
    paper: Mapping[str, float]
    about: tuple[str, ...] = ()
    cited: bool = False

    def summary(self, benchmark: str, split: str) -> Summary | None:
        return self.entry.summary(benchmark, split) if self.entry else None

    @property
    def missing(self) -> str:
        """Why there is no score of ours."""
        return self.entry.missing if self.entry else "not run"


@dataclass(frozen=True)
class Grid:
    """A table of scores.

    Attributes:
        part: of the sweep; empty where that has no parts.
        table: number of the paper's table; None where it has no such table.
        split: of the benchmarks; "" is their own.
        chance: by benchmark.
        blind: by row and benchmark.
        disagreements: what the cells do not have in common though they should.
    """

    title: str
    part: str
    table: int | None
    lines: Sequence[Line]
    benchmarks: Sequence[str]
    split: str
    chance: Mapping[str, float]
    blind: Mapping[str, Mapping[str, float]]
    disagreements: Sequence[str]

    @property
    def entries(self) -> list[Entry]:
        return [line.entry for line in self.lines if line.entry is not None]

    @property
    def has_mean(self) -> bool:
        """Whether the mean over benchmarks means something: all are percentages."""
        return len(self.benchmarks) > 1 and all(self.maximum(name) == 100 for name in self.benchmarks)

    def maximum(self, benchmark: str) -> float:
        """The highest score that there could be."""
        scores = (score for entry in self.entries for score in entry.scores(benchmark, self.split).values())
        return next((score.maximum for score in scores), MAXIMA.get(benchmark, 100.0))

    def ours(self, variant: str) -> dict[Hashable, float | None]:
        """Scores of a projector by row and benchmark."""
        return {
            (line.row, name): summary.mean if (summary := line.summary(name, self.split)) else None
            for line in self.lines
            if line.variant == variant and not line.cited
            for name in self.benchmarks
        }

    def papers(self, variant: str) -> dict[Hashable, float | None]:
        """The paper's scores of a projector by row and benchmark."""
        chosen = [line for line in self.lines if line.variant == variant and line.paper and not line.cited]
        return {(line.row, name): line.paper.get(name) for line in chosen for name in self.benchmarks}


def build_grids(cells: Sequence[Cell], split: str) -> list[Grid]:
    """The paper's Tables 3 and 1 where a cell belongs to them, and a table of all other cells; in a sweep with parts,
    those of each part that has benchmarks."""
    grids: list[Grid] = []
    for part in dict.fromkeys(cell.part for cell in cells):
        own = group(cell for cell in cells if cell.part == part)
        if own and (not part or _benchmarks(own, split)):
            grids += _grids(own, part, [cell for cell in cells if cell.blind], split)
    return grids


def _grids(entries: Sequence[Entry], part: str, blind_cells: Sequence[Cell], split: str) -> list[Grid]:
    rest, grids = list(entries), []
    suffix = f": {part}" if part else ""
    for table in (3, 1):
        chosen = {id(entry): name for entry in rest if (name := paper.setting(entry.cells[0], table))}
        own = [entry for entry in rest if id(entry) in chosen]
        rest = [entry for entry in rest if id(entry) not in chosen]
        if own:
            lines = _paper_lines(table, [(chosen[id(entry)], entry) for entry in own])
            title = f"Table {table} of the paper, and ours{suffix}"
            grids.append(_grid(title, part, table, lines, paper.COLUMNS[table], split, blind_cells))
    if rest:
        lines = [Line(entry.row, entry.variant, entry, {}, _about(entry)) for entry in rest]
        benchmarks = _benchmarks(rest, split)
        grids.append(
            _grid(f"{'Scores' if benchmarks else 'Losses'}{suffix}", part, None, lines, benchmarks, split, blind_cells)
        )
    return grids


def _grid(
    title: str,
    part: str,
    table: int | None,
    lines: Sequence[Line],
    benchmarks: Sequence[str],
    split: str,
    blinds: Sequence[Cell],
) -> Grid:
    entries = [line.entry for line in lines if line.entry is not None]
    levels = {}
    for name in benchmarks:
        scores = (score for entry in entries for score in entry.scores(name, split).values())
        first = next(scores, None)
        level = chance(first) if first is not None else None
        if level is not None:
            levels[name] = level
    floors = {}
    for row in dict.fromkeys(line.row for line in lines):
        members = [cell for line in lines if line.row == row and line.entry for cell in line.entry.cells]
        # Where every line of a part has settings of its own, so has the study's blind model.
        values = blind(members, blinds, split) or (mean_scores(blinds, split) if part else {})
        if values:
            floors[row] = values
    return Grid(title, part, table, lines, benchmarks, split, levels, floors, disagreements(entries, split))


def _paper_lines(table: int, entries: Sequence[tuple[str, Entry]]) -> list[Line]:
    """All of the paper's lines and all of ours, ours beside the paper's of the same setting and projector."""
    printed = paper.lines(table)
    lines = []
    for setting in dict.fromkeys(line.setting for line in printed):
        theirs = [line for line in printed if line.setting == setting]
        about = (theirs[0].backbone, theirs[0].llm)
        own = [entry for name, entry in entries if name == setting]
        scores = {line.projector: line.scores for line in theirs if not line.cited}
        lines += [
            Line(setting, f"{line.projector} (LLaVA-1.5)", None, line.scores, about, cited=True)
            for line in theirs
            if line.cited
        ]
        # Two of our rows of one setting (an axis of recipes, say) both stand beside the paper's.
        names = list(dict.fromkeys(entry.row for entry in own)) or [setting]
        for name in names:
            row = name if len(names) > 1 else setting
            members = {entry.variant: entry for entry in own if entry.row == name}
            for variant in sorted({*scores, *members}, key=lambda v: projector_rank(v.partition(",")[0])):
                entry = members.get(variant)
                numbers = scores.get(entry.projector if entry else variant, {})
                lines.append(Line(row, variant, entry, numbers, about))
    return lines


def _benchmarks(entries: Sequence[Entry], split: str) -> list[str]:
    return benchmarks_of([cell for entry in entries for cell in entry.cells], split)


def _about(entry: Entry) -> tuple[str, ...]:
    config = entry.cells[0].config
    names = (str(config.backbone.name), str(config.llm.name)) if config is not None else ()
    return tuple(name for name in names if name not in entry.row)


def records(grid: Grid) -> list[dict[str, Any]]:
    """A record per line and benchmark, for CSV."""
    rows = []
    for line in grid.lines:
        for name in grid.benchmarks:
            summary, printed = line.summary(name, grid.split), line.paper.get(name)
            low, high = summary.interval if summary else (None, None)
            rows.append(
                {
                    "part": grid.part or None,
                    "table": grid.table,
                    "row": line.row,
                    "projector": line.variant,
                    "benchmark": name,
                    "split": grid.split or None,
                    "score": summary.mean if summary else None,
                    "low95": low,
                    "high95": high,
                    "deviation": summary.deviation if summary else None,
                    "seeds": summary.seeds if summary else 0,
                    "planned_seeds": len(line.entry.cells) if line.entry else 0,
                    "missing": None if summary else line.missing,
                    "paper": printed,
                    "difference": summary.mean - printed if summary and printed is not None else None,
                    "chance": grid.chance.get(name),
                    "blind": grid.blind.get(line.row, {}).get(name),
                }
            )
    return rows


def paper_mean(line: Line, benchmarks: Sequence[str]) -> float | None:
    """Mean of the paper's scores of a line; None where it lacks some."""
    values = [line.paper[name] for name in benchmarks if name in line.paper]
    return fmean(values) if values and len(values) == len(benchmarks) else None
