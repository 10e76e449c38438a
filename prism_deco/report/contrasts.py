"""Tests claims on the cells of a study: differences paired by seed, with intervals and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from prism_deco.report.arms import Side, choose, values
from prism_deco.report.benchmarks import families_of
from prism_deco.report.cells import Cell
from prism_deco.report.compute import is_equal
from prism_deco.report.hypotheses import Claim, Contrast
from prism_deco.report.measures import MEASURES, Relevance, Scores
from prism_deco.report.stats import holm, seed_interval, t_test

HOLDS, REVERSED, UNRESOLVED, MIXED = "holds", "reversed", "not resolved", "mixed"


@dataclass(frozen=True)
class Result:
    """A contrast in one measure.

    Attributes:
        measure: its name in `MEASURES`.
        words: what it is called.
        judged: whether the claim is judged by it; the others are details.
        blind: the same measure of models trained without their images.
        seeds: those that both sides have; the others are not used.
        planned: how many there should be, on any of the two sides.
        effect: mean over the seeds of `first` minus `second`; None where it is not available.
        interval: 95 %, Student's t over seeds; None with fewer than two.
        p, adjusted: of a t test against the contrast's null, and adjusted for all contrasts of the study (Holm).
        paper: the same difference in the paper's Table 1.
        notes: what is missing, and what the two sides do not have in common.
    """

    claim: Claim
    contrast: Contrast
    measure: str
    words: str
    judged: bool
    first: Side
    second: Side
    blind: Side
    seeds: tuple[str, ...]
    planned: int
    effect: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    adjusted: float | None = None
    paper: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """By the interval alone: `holds` above the contrast's null, `reversed` below it."""
        if self.interval is None or self.interval[0] <= self.contrast.null <= self.interval[1]:
            return UNRESOLVED
        return HOLDS if self.interval[0] > self.contrast.null else REVERSED

    @property
    def unit(self) -> str:
        return MEASURES[self.measure].unit

    @property
    def pair(self) -> str:
        return f"{self.first.name} − {self.second.name}"  # noqa: RUF001


def evaluate(claims: Sequence[Claim], cells: Sequence[Cell], benchmarks: Sequence[str], split: str) -> list[Result]:
    """All contrasts in all their measures, in the claims' order.

    Args:
        cells: of one study.
        benchmarks: of the study; a cell that lacks one of them has no mean.

    Raises:
        UsageError: the labels of a side are those of several cells of one seed.
    """
    families = families_of(cells, benchmarks)
    found = [
        _evaluate(claim, contrast, name, cells, families, split)
        for claim in claims
        for contrast in claim.contrasts
        for name in contrast.measures
    ]
    tested = {number: result.p for number, result in enumerate(found) if result.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return [replace(result, adjusted=adjusted.get(number)) for number, result in enumerate(found)]


def verdict(results: Sequence[Result]) -> str:
    """Of several contrasts: holds or reversed where all do, mixed where some hold and others are reversed."""
    verdicts = {result.verdict for result in results}
    if {HOLDS, REVERSED} <= verdicts:
        return MIXED
    return verdicts.pop() if len(verdicts) == 1 else UNRESOLVED


def _evaluate(
    claim: Claim, contrast: Contrast, name: str, cells: Sequence[Cell], families: Mapping[str, str], split: str
) -> Result:
    measure = MEASURES[name]

    def read(cell: Cell) -> float | None:
        return measure.read(cell, families, split)

    first, second = (choose(cells, labels, read, claim.name) for labels in (contrast.first, contrast.second))
    unlike = first.tokens != second.tokens
    first, second = replace(first, unlike=unlike), replace(second, unlike=unlike)
    planned = sorted({*first.cells, *second.cells}, key=_by_number)
    seeds = tuple(seed for seed in planned if seed in first.values and seed in second.values)
    result = Result(
        claim,
        contrast,
        name,
        measure.words(families),
        contrast.judges and name == contrast.measures[0],
        first,
        second,
        Side(values=values([cell for cell in cells if cell.blind], read)),
        seeds,
        len(planned),
        paper=_paper(measure, contrast),
    )
    pairs = [(first.cells[seed], second.cells[seed]) for seed in seeds]
    notes = [*first.missing(planned), *second.missing(planned)]
    obstacles = _obstacles(contrast, lambda cell: measure.asked(cell, families, split), pairs)
    if not seeds or obstacles:
        return replace(result, notes=(*notes, *obstacles))
    if isinstance(measure, Scores):
        sides = [side for side in (first, second) if side.is_above(result.blind) is False]
        notes += [f"{side.name} is not clearly above the blind model" for side in sides]
    differences = [first.values[seed] - second.values[seed] for seed in seeds]
    if len(seeds) < 2:
        return replace(result, effect=differences[0], notes=(*notes, "one seed has no interval"))
    return replace(
        result,
        effect=fmean(differences),
        interval=seed_interval(differences),
        p=t_test(differences, contrast.null),
        notes=tuple(notes),
    )


def _obstacles(contrast: Contrast, asked: Callable[[Cell], object], pairs: Sequence[tuple[Cell, Cell]]) -> list[str]:
    """Why the two sides do not compare."""
    found = []
    if any(one.manifest["data_hash"] != other.manifest["data_hash"] for one, other in pairs):
        found.append("the training data differ")
    if any(asked(one) != asked(other) for one, other in pairs):
        found.append("the questions differ")
    if contrast.equal == "steps":
        if any(one.manifest["steps"] != other.manifest["steps"] for one, other in pairs):
            found.append("the steps differ")
        return found
    equal = [is_equal(pair) for pair in pairs]
    if None in equal:
        found.append("what the training cost is not known")
    elif not all(equal):
        found.append("what the training cost differs")
    return found


def _paper(measure: Scores | Relevance, contrast: Contrast) -> float | None:
    """The paper's difference, of two of its projectors as they are."""
    sides = (contrast.first, contrast.second)
    if not isinstance(measure, Scores) or any(set(labels) - {"part", "projector"} for labels in sides):
        return None
    return measure.paper(*(labels.get("projector", "") for labels in sides))


def _by_number(seed: str) -> tuple[int, str]:
    return (int(seed), "") if seed.lstrip("-").isdigit() else (0, seed)
