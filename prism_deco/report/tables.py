"""The report's tables: scores beside the paper's, wins, gains, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean, stdev

from prism_deco.evaluation.compressors import COMPRESSORS
from prism_deco.report import paper
from prism_deco.report.cells import TRAIN_LOSS, VAL_LOSS, SeedGroup
from prism_deco.report.grid import SECONDARY, ScoreRow, ScoreTable, paper_mean, secondary_values
from prism_deco.report.paired_tests import BASE, MEAN, Difference
from prism_deco.report.recipe_diff import recipes
from prism_deco.report.stats import count_wins
from prism_deco.report.tabular import MISSING, Field, Table, format_interval, format_number, under_headings

_LONG = 24
"""Most rows of a table that shows secondary metrics; readings.csv always has them."""


def scores_table(table: ScoreTable, differences: Sequence[Difference] = ()) -> Table:
    """Our scores, with intervals and the paper's numbers in smaller print.

    Args:
        differences: of this table; they decide which scores are bold.
    """
    names = [*table.benchmarks, *([MEAN] if table.has_mean else [])]
    rows = []
    for name in dict.fromkeys(row.row for row in table.rows):
        members = [row for row in table.rows if row.row == name]
        heading = Field(name, members[0].about)
        rows_of_cells = {row.group.row for row in members}  # in a table of the paper, not its name for the row
        own = [pair for pair in differences if pair.row in rows_of_cells]
        leaders = {column: _leader(table, members, column, own) for column in names}
        for row in members:
            tokens = Field(str(row.group.tokens or MISSING))
            fields = [_score(table, row, column, best=leaders[column] is row) for column in names]
            control = ("control",) if row.group.control else ()
            rows.append((heading, [Field(row.variant, control), tokens, *fields]))
        for baseline, values in (("blind", table.blind.get(name)), ("chance", table.chance)):
            if values:
                rows.append((heading, [Field(baseline), Field(MISSING), *_baseline(values, names)]))
    columns = ["projector", "tokens", *names]
    return Table(table.title, columns, under_headings(rows), caption=_caption(table))


def _score(table: ScoreTable, row: ScoreRow, name: str, *, best: bool) -> Field:
    printed = paper_mean(row, table.benchmarks) if name == MEAN else row.paper.get(name)
    lines = [] if printed is None else [f"paper {format_number(printed)}"]
    if row.cited:
        return Field(MISSING, tuple(lines))
    summary = table.summary(row.group, name)
    if summary is None:
        return Field(row.group.missing, tuple(lines))
    if printed is not None:
        lines.append(f"Δ {format_number(summary.mean - printed, sign='+')}")
    planned = len(row.group.cells)
    if summary.seeds < planned:
        lines.append(f"{summary.seeds} of {planned} seeds")
    if len(table.rows) <= _LONG:
        for metric, values in secondary_values(row.group, name, table.split).items():
            lines.append(f"{metric.replace('_', ' ')} {format_number(fmean(values))}")
    spread = f" ±{format_number(summary.deviation)}" if summary.deviation is not None else ""
    return Field(f"{format_number(summary.mean)}{spread}", (format_interval(summary.interval), *lines), best=best)


def _leader(
    table: ScoreTable, rows: Sequence[ScoreRow], name: str, differences: Sequence[Difference]
) -> ScoreRow | None:
    """The row that is clearly ahead of all others; None if there is none.

    Args:
        rows: the lines of one row of the study.
        differences: between their projectors.
    """
    known = []
    for row in rows:
        summary = table.summary(row.group, name)
        if summary is not None:
            known.append((summary.mean, row))
    if len(known) < 2:
        return None
    # By the score alone: on a tie, `ScoreRow` has no order.
    (_, first), *others = sorted(known, key=lambda item: -item[0])
    # Sets, since either of the two may come first in a pair.
    clear = [{pair.first, pair.second} for pair in differences if pair.is_clear and pair.benchmark == name]
    return first if all({first.variant, other.variant} in clear for _, other in others) else None


def _baseline(values: Mapping[str, float], names: Sequence[str]) -> list[Field]:
    own = [name for name in names if name != MEAN]
    mean = fmean(values[name] for name in own) if all(name in values for name in own) else None
    return [Field(format_number(mean if name == MEAN else values.get(name))) for name in names]


def _caption(table: ScoreTable) -> str:
    several = any(len(group.cells) > 1 for group in table.groups)
    parts = [
        "Mean ± standard deviation over seeds; below it the 95 % interval over seeds (Student's t), or over items "
        "where only one seed is scored."
        if several
        else "One seed per cell; below each score its 95 % interval over items, which says nothing about other seeds.",
        "Bold: better than all others in the row; the intervals of these differences exclude zero.",
    ]
    if table.table:
        parts.append(recipes(table.cells))
        parts.append(
            "Below that, the paper's number, and Δ: ours minus the paper's. Where a benchmark has several metrics, the "
            "paper does not say which one it reports."
        )
    asked = {}
    for name in table.benchmarks:
        # The distinct ways in which the groups were asked, without those of versions that did not record it.
        asked[name] = "/".join(filter(None, dict.fromkeys(g.asked_as(name, table.split) for g in table.groups)))
    if any(asked.values()):
        parts.append(f"Asked as: {', '.join(f'{name} {way}' for name, way in asked.items() if way)}.")
    used = {cell.compressor for cell in table.cells} & set(COMPRESSORS.names())
    parts += filter(None, (getattr(COMPRESSORS.get(name), "note", "") for name in sorted(used)))
    if any(group.control for group in table.groups):
        parts.append("control: what a projector must beat to be worth anything.")
    # Configurations of earlier versions lack the key.
    if any(cell.config is not None and cell.config.trainer.get("feature_cache") is True for cell in table.cells):
        parts.append(
            "The towers' features were cached before training, so training times are those of projector and LLM."
        )
    if table.has_mean:
        parts.append("With one seed the mean's interval assumes independent benchmarks.")
    if table.chance:
        parts.append("chance: the best constant answer.")
    if table.blind:
        own = ", each model at the settings chosen for it" if table.part else ""
        parts.append(f"blind: the same LLM, data and recipe, trained without the images{own}.")
    shown: set[str] = set()
    if len(table.rows) > _LONG:
        parts.append("Further metrics of the benchmarks are in readings.csv.")
    else:
        for group, name in product(table.groups, table.benchmarks):
            shown.update(secondary_values(group, name, table.split))
    parts += [text for name, text in SECONDARY.items() if any(metric.endswith(name) for metric in shown)]
    if any("/" in metric for metric in shown):
        parts.append("Metrics with a slash: the same questions, asked in another variant of the benchmark.")
    steps = {cell.manifest["steps"] for cell in table.cells if cell.manifest}
    if len(steps) > 1 and not table.disagreements:
        parts.append(f"The rows have {min(steps):,} to {max(steps):,} steps, with the same compute.")
    return " ".join(parts)


def losses_table(table: ScoreTable) -> Table:
    """The final losses of cells that are not scored on benchmarks."""
    rows = []
    for group in table.groups:
        train = [fmean(curve[-max(1, len(curve) // 40) :]) for curve in _values(group, TRAIN_LOSS)]
        val = [curve[-1] for curve in _values(group, VAL_LOSS)]
        tokens = Field(str(group.tokens or MISSING))
        rows.append((Field(group.row), [Field(group.variant), tokens, _loss(train), _loss(val)]))
    caption = "Nats per token: the mean over the last 1/40 of training, and the last validation."
    columns = ["projector", "tokens", "training loss", "validation loss"]
    return Table(table.title, columns, under_headings(rows), caption=caption)


def _values(group: SeedGroup, name: str) -> list[list[float]]:
    curves = [[value for _, value in cell.curves.get(name, [])] for cell in group.cells]
    return [curve for curve in curves if curve]


def _loss(values: Sequence[float]) -> Field:
    if not values:
        return Field(MISSING)
    spread = f" ±{format_number(stdev(values), 3)}" if len(values) > 1 else ""
    return Field(f"{format_number(fmean(values), 3)}{spread}")


def wins_table(table: ScoreTable) -> Table | None:
    """How often the base projector is ahead of each other projector; None if there is no other."""
    variants = list(dict.fromkeys(row.variant for row in table.rows if not row.cited))
    # The base projector, with settings of its own if there are any; without it, the first projector stands in.
    bases = [variant for variant in variants if variant.partition(",")[0] == BASE] or variants[:1]
    rows = []
    for other in variants:
        if other != bases[0]:
            own = count_wins(table.ours(bases[0]), table.ours(other))
            fields = [Field(str(count)) for count in own]
            if table.table:
                theirs = count_wins(table.papers(bases[0]), table.papers(other))
                total = theirs.ahead + theirs.behind + theirs.tied
                text = f"{theirs.ahead} of {total} ahead, {theirs.behind} behind, {theirs.tied} tied"
                fields.append(Field(text if total else MISSING))
            rows.append([Field(f"{bases[0]} over {other}"), *fields])
    if not rows:
        return None
    columns = ["pair", "ahead", "behind", "tied", "missing", *(["paper"] if table.table else [])]
    caption = "One comparison per row and benchmark, of scores as printed, to one decimal."
    return Table("Wins", columns, rows, caption=caption)


def worth_table(table: ScoreTable, differences: Sequence[Difference]) -> Table | None:
    """Cost and gain of each projector compared with the base projector of its row; None without means.

    Args:
        differences: of this table.
    """
    rows = []
    for base in [group for group in table.groups if group.variant == BASE and group.cells[0].manifest]:
        members = {group.variant: group for group in table.groups if group.row == base.row and group.cells[0].manifest}
        # `paired_differences` puts the base projector first in each of its pairs.
        own = [pair for pair in differences if (pair.row, pair.benchmark, pair.first) == (base.row, MEAN, BASE)]
        for pair in sorted(own, key=lambda pair: pair.value or 0.0):  # of the base projector minus the other one
            if pair.value is None or pair.second not in members:
                continue
            group = members[pair.second]
            added = _trained(group) - _trained(base)
            fields = [
                Field(group.variant, ("control",) if group.control else ()),
                Field(str(group.tokens)),
                Field(f"{added:+,}" if added else "none"),
                Field(format_number(group.training_minutes)),
                Field(format_number(group.first_token_ms)),
                # The pair is base minus other, the table shows other minus base.
                Field(format_number(-pair.value, sign="+"), best=pair.is_clear),
                Field(format_interval(_negative(pair.interval), sign="+")),
                Field(format_interval(_negative(pair.over_seeds), sign="+")),
            ]
            rows.append((Field(base.row), fields))
    if not rows:
        return None
    columns = ["projector", "tokens", "added parameters", "training (min)", "first token (ms)"]
    columns += [f"mean score − {BASE}", "95 % over items", "95 % over seeds"]  # noqa: RUF001
    caption = (
        f"Compared with {BASE} at the row's number of tokens, best first. Added parameters: trained ones that {BASE} "
        "does not have. Training: measured time of all steps. First token: measured time from one image and a short "
        "question to the first token of the answer. Both are the median over seeds. Bold: the intervals, not adjusted "
        "for their number, exclude zero."
    )
    return Table("Which projector is worth its parameters", columns, under_headings(rows), caption=caption)


def _trained(group: SeedGroup) -> int:
    return int(group.cells[0].manifest["params"]["trained"])


def _negative(bounds: tuple[float, float] | None) -> tuple[float, float] | None:
    # Swapped too, so that the lower bound comes first.
    return (-bounds[1], -bounds[0]) if bounds else None


def gains_table(table: ScoreTable) -> Table:
    """The relative gains stated in the paper's abstract, from its scores and from ours."""
    # The paper's Table 1 has one setting, so a benchmark is enough as a key. Of several rows of ours, the last one that
    # has a score counts.
    first = {name: mean for (_, name), mean in table.ours(BASE).items() if mean is not None}
    second = {name: mean for (_, name), mean in table.ours("c_abstractor").items() if mean is not None}
    printed = paper.scores(1)
    theirs = paper.gains(printed["T1", BASE], printed["T1", "c_abstractor"])
    ours = paper.gains(first, second)
    rows = [
        [Field(name), Field(format_number(ours[name], sign="+")), Field(format_number(theirs[name], 2, sign="+"))]
        for name in paper.GAIN_GROUPS
    ]
    caption = "The gain in per cent of C-Abstractor's score, averaged over the group's columns."
    return Table("Relative gain of avgpool over c_abstractor (%)", ["group", "ours", "paper"], rows, caption=caption)


def spatial_table(table: ScoreTable) -> Table:
    """The six spatial tasks of Table 2; of the paper's scores, only the averages are known."""
    tasks = [f"{benchmark}: {metric.rpartition('/')[2].replace('_', ' ')}" for benchmark, metric, _ in paper.SPATIAL]
    printed = paper.spatial_averages()
    rows = []
    for row in table.rows:
        if row.cited:
            continue
        values = _spatial(row.group, table.split)
        known = [value for value in values if value is not None]
        mean = fmean(known) if len(known) == len(tasks) else None
        target = printed.get(row.variant)
        lines = [f"paper {format_number(target)}"] if target is not None else []
        if mean is not None and target is not None:
            lines.append(f"Δ {format_number(mean - target, sign='+')}")
        # One text for each task, and last the mean, which also has the paper's number below it.
        texts = [row.group.missing if value is None else format_number(value) for value in (*values, mean)]
        rows.append([Field(row.variant), *map(Field, texts[:-1]), Field(texts[-1], tuple(lines))])
    caption = (
        "Each task in per cent of its maximum (MME's position: 200 points), averaged over seeds; the last column is "
        "the mean of the six. Only the averages of the paper's table are known."
    )
    return Table("Table 2 of the paper, and ours", ["projector", *tasks, "average"], rows, caption=caption)


def _spatial(group: SeedGroup, split: str) -> list[float | None]:
    """The mean over the seeds of each task of Table 2."""
    means: list[float | None] = []
    for benchmark, metric, maximum in paper.SPATIAL:
        scores = [cell.scores.get(split, {}).get(benchmark) for cell in group.cells]
        values = [score.content["metrics"].get(metric) for score in scores if score is not None]
        percent = [100 * value / maximum for value in values if value is not None]
        means.append(fmean(percent) if percent else None)
    return means


def differences_table(found: Sequence[Difference], title: str = "Differences") -> Table:
    """Pairs of projectors, compared question by question."""
    rows = []
    for pair in found:
        heading = Field(f"{pair.row}: {pair.first} − {pair.second}")  # noqa: RUF001
        if pair.value is None:
            fields = [Field("not available", (pair.note,)), *[Field(MISSING)] * 5]
        else:
            clear = pair.adjusted is not None and pair.adjusted < 0.05 and pair.is_clear
            fields = [
                Field(format_number(pair.value, sign="+"), best=clear),
                Field(format_interval(pair.interval, sign="+")),
                Field(format_interval(pair.over_seeds, sign="+")),
                Field(str(pair.seeds)),
                Field(format_p(pair.p)),
                Field(format_p(pair.adjusted), best=clear),
            ]
        rows.append((heading, [Field(pair.benchmark), *fields]))
    columns = ["benchmark", "difference", "95 % over items", "95 % over seeds", "seeds", "p", "p (Holm)"]
    caption = (
        "Differences in the benchmark's unit. Over items: paired bootstrap over the questions. Over seeds: Student's t "
        "over the differences of equal seeds. p: exact McNemar test (a sign test where an item's score is not just "
        "right or wrong). p (Holm): adjusted for the tests of all pairs. Bold: p (Holm) below 0.05, and both intervals "
        "exclude zero. With one seed, all of this compares two trained models, not two projectors."
    )
    return Table(title, columns, under_headings(rows), caption=caption)


def format_p(p: float | None) -> str:
    """A p-value with three decimals, or as a bound."""
    if p is None:
        return MISSING
    return "<0.001" if p < 0.001 else f"{p:.3f}"
