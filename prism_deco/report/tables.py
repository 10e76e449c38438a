"""The report's tables: scores beside the paper's, wins, gains, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from prism_deco.report import paper
from prism_deco.report.cells import Entry, Summary
from prism_deco.report.grid import Grid, Line, paper_mean
from prism_deco.report.paired_tests import BASE, Difference, leads
from prism_deco.report.stats import Wins, count_wins
from prism_deco.report.tabular import MISSING, Field, Table, interval, number


def scores(grid: Grid, found: Sequence[Difference] = ()) -> Table:
    """The grid itself: ours, and in smaller print its interval and the paper's number.

    Args:
        found: differences of the grid, by which a best score is clear.
    """
    columns = ["row", "projector", "tokens", *grid.benchmarks, *(["mean"] if grid.has_mean else [])]
    best = {(line.row, name): _leader(grid, line.row, name, found) for line in grid.lines for name in columns[3:]}
    rows, starts = [], set()
    for position, line in enumerate(grid.lines):
        first = position == 0 or grid.lines[position - 1].row != line.row
        if first:
            starts.add(len(rows))
        tokens = line.entry.tokens if line.entry else None
        rows.append(
            [
                Field(line.row, line.about) if first else Field(""),
                Field(line.variant),
                Field(str(tokens) if tokens else MISSING),
                *(_score(grid, line, name, best[line.row, name]) for name in columns[3:]),
            ]
        )
        last = position + 1 == len(grid.lines) or grid.lines[position + 1].row != line.row
        floor = grid.blind.get(line.row)
        if last and floor:
            rows.append([Field(""), Field("blind", muted=True), Field(MISSING), *_floor(floor, columns[3:])])
    if grid.chance:
        starts.add(len(rows))
        rows.append([Field("chance"), Field(""), Field(MISSING), *_floor(grid.chance, columns[3:])])
    return Table(grid.title, columns, rows, heads=2, caption=_caption(grid), starts=frozenset(starts))


def _score(grid: Grid, line: Line, name: str, best: Line | None) -> Field:
    summary, printed = _ours(grid, line, name), _paper(grid, line, name)
    if line.cited:
        return Field(MISSING, (f"paper {number(printed)}",), muted=True)
    beside = [] if printed is None else [f"paper {number(printed)}"]
    if summary is None:
        return Field(line.missing, tuple(beside), muted=True)
    if printed is not None:
        beside = [f"paper {number(printed)}", f"Δ {number(summary.mean - printed, sign='+')}"]
    spread = f" ±{number(summary.deviation)}" if summary.deviation is not None else ""
    few = [f"{summary.seeds} of {summary.planned} seeds"] if summary.seeds < summary.planned else []
    lines = (interval(summary.interval), *beside, *few)
    return Field(f"{number(summary.mean)}{spread}", lines, best=line is best)


def _ours(grid: Grid, line: Line, name: str) -> Summary | None:
    if name != "mean":
        return line.summary(name, grid.split)
    return line.entry.overall(grid.benchmarks, grid.split) if line.entry else None


def _paper(grid: Grid, line: Line, name: str) -> float | None:
    return paper_mean(line, grid.benchmarks) if name == "mean" else line.paper.get(name)


def _leader(grid: Grid, row: str, name: str, found: Sequence[Difference]) -> Line | None:
    """The line that is clearly ahead of all others of its row."""
    known = [(line, summary.mean) for line in grid.lines if line.row == row and (summary := _ours(grid, line, name))]
    if len(known) < 2:
        return None
    (first, _), *others = sorted(known, key=lambda item: -item[1])
    names = grid.benchmarks if name == "mean" else [name]
    own = [pair for pair in found if pair.row == row and pair.benchmark in names]
    return first if all(_leads(grid, first, other, name, own) for other, _ in others) else None


def _leads(grid: Grid, first: Line, second: Line, name: str, found: Sequence[Difference]) -> bool:
    if name == "mean":
        assert first.entry is not None and second.entry is not None
        return leads(first.entry, second.entry, grid.benchmarks, grid.split, found)
    return any(pair.is_clear for pair in found if {pair.first, pair.second} == {first.variant, second.variant})


def _floor(values: Mapping[str, float], names: Sequence[str]) -> list[Field]:
    own = [name for name in names if name != "mean"]
    mean = fmean(values[name] for name in own) if all(name in values for name in own) else None
    return [Field(number(mean if name == "mean" else values.get(name)), muted=True) for name in names]


def _caption(grid: Grid) -> str:
    several = any(len(entry.cells) > 1 for entry in grid.entries)
    parts = [
        "Mean over seeds ± their standard deviation; below it the 95 % interval over seeds (Student's t; over items "
        "where only one seed is scored)."
        if several
        else "One seed per cell; below each score its 95 % interval over items, which says nothing about other seeds.",
        "Bold: ahead of all others of its row, zero outside the intervals of the differences.",
    ]
    if grid.table:
        parts.append("Then the paper's number, and Δ: ours minus the paper's.")
    if grid.has_mean:
        parts.append("The mean's interval takes the benchmarks for independent where there is one seed.")
    if grid.chance:
        parts.append("chance: the best constant answer.")
    if grid.blind:
        own = ", each line and the blind one at the settings chosen for it" if grid.part else ""
        parts.append(f"blind: the same LLM, data and recipe, trained without the images{own}.")
    steps = {cell.manifest["steps"] for entry in grid.entries for cell in entry.cells if cell.manifest}
    if len(steps) > 1 and not grid.disagreements:
        parts.append(f"The lines have {min(steps):,} to {max(steps):,} steps, which cost the same arithmetic.")
    return " ".join(parts)


def losses(grid: Grid) -> Table:
    """What cells without benchmarks are there for: where their losses ended."""
    rows, starts = [], set()
    for position, entry in enumerate(grid.entries):
        first = position == 0 or grid.entries[position - 1].row != entry.row
        if first:
            starts.add(len(rows))
        train = [fmean(curve[-max(1, len(curve) // 40) :]) for curve in _values(entry, "train/loss")]
        val = [curve[-1] for curve in _values(entry, "val/loss")]
        ends = [Field(f"{number(fmean(its), 3)}{_deviation(its)}") if its else Field(MISSING) for its in (train, val)]
        tokens = str(entry.tokens) if entry.tokens else MISSING
        rows.append([Field(entry.row if first else ""), Field(entry.variant), Field(tokens), *ends])
    caption = "Nats per token: the mean over the last fortieth of the training, and the last validation."
    columns = ["row", "projector", "tokens", "training loss", "validation loss"]
    return Table(grid.title, columns, rows, heads=2, caption=caption, starts=frozenset(starts))


def _values(entry: Entry, name: str) -> list[list[float]]:
    curves = ([value for _, value in cell.curves.get(name, [])] for cell in entry.cells)
    return [curve for curve in curves if curve]


def _deviation(values: Sequence[float]) -> str:
    return f" ±{number(stdev(values), 3)}" if len(values) > 1 else ""


def wins(grid: Grid) -> Table | None:
    """How often the base projector is ahead of each other; None where there is no pair."""
    rows = []
    for base, other in _pairs(grid):
        own = count_wins(grid.ours(base), grid.ours(other))
        printed = count_wins(grid.papers(base), grid.papers(other))
        cells = [own.ahead, own.behind, own.tied, own.missing]
        paper_cell = [Field(_words(printed))] if grid.table else []
        rows.append([Field(f"{base} over {other}"), *(Field(str(n)) for n in cells), *paper_cell])
    if not rows:
        return None
    columns = ["pair", "ahead", "behind", "tied", "missing", *(["paper"] if grid.table else [])]
    caption = "Places are a row and a benchmark; scores are compared as printed, with one decimal."
    return Table("Wins", columns, rows, caption=caption)


def _pairs(grid: Grid) -> list[tuple[str, str]]:
    variants = list(dict.fromkeys(line.variant for line in grid.lines if not line.cited))
    bases = [variant for variant in variants if variant.partition(",")[0] == BASE] or variants[:1]
    return [(bases[0], variant) for variant in variants if variant != bases[0]] if bases else []


def _words(wins: Wins) -> str:
    if not wins.total:
        return MISSING
    return f"{wins.ahead} of {wins.total} ahead, {wins.behind} behind, {wins.tied} tied"


def gains(grid: Grid) -> Table:
    """The relative gains that the abstract states, from the paper's cells and from ours."""
    own = {variant: _all(grid, variant) for variant in (BASE, "c_abstractor")}
    printed = paper.scores(1)
    theirs = paper.gains(printed["T1", BASE], printed["T1", "c_abstractor"])
    ours = paper.gains(own[BASE], own["c_abstractor"])
    rows = [
        [Field(name), Field(number(ours[name], sign="+")), Field(number(theirs[name], 2, sign="+"))]
        for name in paper.GAIN_GROUPS
    ]
    caption = "Mean over the group's columns of the gain in per cent of C-Abstractor's score."
    return Table("Relative gain of avgpool over c_abstractor (%)", ["group", "ours", "paper"], rows, caption=caption)


def _all(grid: Grid, variant: str) -> dict[str, float]:
    return {str(name): mean for (_, name), mean in grid.ours(variant).items() if mean is not None}  # type: ignore[misc]


def spatial(grid: Grid) -> Table:
    """Table 2: six spatial tasks; of the paper only the averages are known."""
    tasks = [f"{benchmark}: {metric.rpartition('/')[2].replace('_', ' ')}" for benchmark, metric, _ in paper.SPATIAL]
    printed, rows = paper.spatial_averages(), []
    for line in grid.lines:
        if line.cited:
            continue
        shares = _shares(line.entry, grid.split) if line.entry else [None] * len(tasks)
        mean = fmean(known) if len(known := [s for s in shares if s is not None]) == len(tasks) else None
        target = printed.get(line.variant)
        beside = f"paper {number(target)}" if target is not None else "not published"
        if mean is not None and target is not None:
            beside += f", Δ {number(mean - target, sign='+')}"
        fields = [_share(share, line, "not published") for share in shares]
        rows.append([Field(line.variant), *fields, _share(mean, line, beside)])
    caption = (
        "Each task in per cent of its highest score (MME's position: 200 points), mean over seeds; the average is the "
        "mean of the six. Of the paper's table only the averages are known."
    )
    return Table("Table 2 of the paper, and ours", ["projector", *tasks, "average"], rows, caption=caption)


def _share(value: float | None, line: Line, beside: str) -> Field:
    return Field(number(value) if value is not None else line.missing, (beside,), muted=value is None)


def _shares(entry: Entry, split: str) -> list[float | None]:
    by_seed = [
        paper.spatial({name: score.content["metrics"] for name, score in cell.scores.get(split, {}).items()})
        for cell in entry.cells
    ]
    known = [[value for value in values if value is not None] for values in zip(*by_seed, strict=True)]
    return [fmean(values) if values else None for values in known]


def differences(found: Sequence[Difference], title: str = "Differences") -> Table:
    """Pairs of projectors, question by question."""
    rows, starts = [], set()
    previous = None
    for one in found:
        place = (one.row, one.first, one.second)
        if place != previous:
            starts.add(len(rows))
        heads = [Field(one.row), Field(f"{one.first} − {one.second}")] if place != previous else [Field("")] * 2  # noqa: RUF001
        previous = place
        if one.value is None:
            note = Field("not available", (one.note,), muted=True)
            rows.append([*heads, Field(one.benchmark), note, *[Field(MISSING)] * 5])
            continue
        clear = one.adjusted is not None and one.adjusted < 0.05 and one.is_clear
        rows.append(
            [
                *heads,
                Field(one.benchmark),
                Field(number(one.value, sign="+"), best=clear),
                Field(interval(one.interval, sign="+")),
                Field(interval(one.over_seeds, sign="+")),
                Field(str(one.seeds)),
                Field(p_value(one.p)),
                Field(p_value(one.adjusted), best=clear),
            ]
        )
    columns = ["row", "pair", "benchmark", "difference", "95 % over items", "95 % over seeds", "seeds", "p", "p (Holm)"]
    caption = (
        "Differences in the benchmark's unit. Over items: paired bootstrap of the same questions. Over seeds: "
        "Student's t of the differences seed by seed. p: exact McNemar test (a sign test where an item's score is not "
        "just right or wrong); p (Holm) is adjusted for all tests of all pairs. Bold: p (Holm) below 0.05, and zero "
        "outside both intervals. With one seed all of this is about these two models, not their projectors."
    )
    return Table(title, columns, rows, heads=3, caption=caption, starts=frozenset(starts))


def p_value(p: float | None) -> str:
    """A p-value as printed: three decimals, or a bound."""
    if p is None:
        return MISSING
    return "<0.001" if p < 0.001 else f"{p:.3f}"
