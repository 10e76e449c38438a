"""Tests claims on the cells of a study: differences paired by seed, with intervals and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from prism_deco.report.arms import OUTCOMES, Arm, BenchmarkMean, choose_arm, label_text, read_values
from prism_deco.report.benchmarks import families_of
from prism_deco.report.cells import RunCell
from prism_deco.report.compute import same_compute
from prism_deco.report.hypotheses import Claim, Contrast
from prism_deco.report.stats import holm, seed_interval, t_test

HOLDS, REVERSED, UNRESOLVED, MIXED = "holds", "reversed", "not resolved", "mixed"

ALPHA = 0.05


@dataclass(frozen=True)
class ContrastResult:
    """A contrast in one outcome.

    Attributes:
        measure: the outcome's name in `OUTCOMES`.
        label: what it is called.
        judged: whether the claim is judged by it; the others are details.
        blind: the same outcome of models trained without their images.
        planned: the seeds that there should be.
        seeds: those that both arms have; the others are not used.
        effect: mean over the seeds of `first` minus `second`; None where it is not available.
        interval: 95 %, Student's t over seeds; None with fewer than two.
        p, adjusted: of a t test against the contrast's null, and adjusted for all contrasts of the study (Holm).
        paper: the same difference in the paper's Table 1.
        notes: what is missing, and what the two arms do not have in common.
    """

    claim: Claim
    contrast: Contrast
    measure: str
    label: str
    first: Arm
    second: Arm
    blind: Arm
    planned: tuple[str, ...]
    seeds: tuple[str, ...]
    paper: float | None
    notes: tuple[str, ...]
    effect: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    adjusted: float | None = None

    @property
    def judged(self) -> bool:
        return self.contrast.judges and self.measure == self.contrast.measures[0]

    @property
    def verdict(self) -> str:
        """By the interval alone: `holds` above the contrast's null, `reversed` below it."""
        if self.interval is None or self.interval[0] <= self.contrast.null <= self.interval[1]:
            return UNRESOLVED
        return HOLDS if self.interval[0] > self.contrast.null else REVERSED

    @property
    def is_clear(self) -> bool:
        """Whether the verdict stands after the adjustment for all contrasts."""
        return self.verdict != UNRESOLVED and self.adjusted is not None and self.adjusted < ALPHA

    @property
    def unit(self) -> str:
        return OUTCOMES[self.measure].unit

    @property
    def pair(self) -> str:
        return f"{self.first.name(self.second)} − {self.second.name(self.first)}"  # noqa: RUF001


def evaluate_claims(
    claims: Sequence[Claim], cells: Sequence[RunCell], benchmarks: Sequence[str], split: str
) -> list[ContrastResult]:
    """All contrasts in all their outcomes, in the claims' order.

    Args:
        cells: of one study.
        benchmarks: of the study; a cell that was not scored on one of them has no mean.

    Raises:
        UsageError: the labels of an arm are those of several cells of one seed.
    """
    families = families_of(cells, benchmarks)
    found = []
    for claim in claims:
        for contrast in claim.contrasts:
            found += [_test(claim, contrast, name, cells, families, split) for name in contrast.measures]
    adjusted = holm([result.p for result in found])
    return [replace(result, adjusted=p) for result, p in zip(found, adjusted, strict=True)]


def joint_verdict(results: Sequence[ContrastResult]) -> str:
    """Of several contrasts: holds or reversed where all do, mixed where some hold and others are reversed."""
    verdicts = {result.verdict for result in results}
    if {HOLDS, REVERSED} <= verdicts:
        return MIXED
    return verdicts.pop() if len(verdicts) == 1 else UNRESOLVED


def _test(
    claim: Claim,
    contrast: Contrast,
    measure: str,
    cells: Sequence[RunCell],
    families: Mapping[str, str],
    split: str,
) -> ContrastResult:
    outcome = OUTCOMES[measure]

    def read(cell: RunCell) -> float | None:
        return outcome.read(cell, families, split)

    def questions(cell: RunCell) -> object:
        return outcome.questions(cell, families, split)

    first = choose_arm(cells, contrast.first, read, claim.name)
    second = choose_arm(cells, contrast.second, read, claim.name)
    blind = Arm(values=read_values([cell for cell in cells if cell.blind], read))
    planned = sorted({*first.cells, *second.cells}, key=_by_number)
    seeds = [seed for seed in planned if seed in first.values and seed in second.values]
    pairs = [(first.cells[seed], second.cells[seed]) for seed in seeds]
    obstacles = _obstacles(contrast, pairs)
    if any(questions(one) != questions(other) for one, other in pairs):
        obstacles.append("the questions differ")
    # The paper's projectors are as they are: with further labels an arm is not one of them.
    plain = {*contrast.first, *contrast.second} <= {"part", "projector"}
    projectors = [arm.get("projector", "") for arm in (contrast.first, contrast.second)]
    result = ContrastResult(
        claim,
        contrast,
        measure,
        outcome.label(families),
        first,
        second,
        blind,
        tuple(planned),
        tuple(seeds),
        outcome.paper_difference(*projectors) if plain else None,
        (*_missing(first, second, planned), *_missing(second, first, planned), *obstacles),
    )
    if not seeds or obstacles:
        return result
    notes = list(result.notes)
    if isinstance(outcome, BenchmarkMean):
        for arm, other in ((first, second), (second, first)):
            if arm.is_above(blind) is False:
                notes.append(f"{arm.name(other)} is not clearly above the blind model")
    gains = [first.values[seed] - second.values[seed] for seed in seeds]
    if len(seeds) < 2:
        return replace(result, effect=gains[0], notes=(*notes, "one seed has no interval"))
    p = t_test(gains, contrast.null)
    return replace(result, effect=fmean(gains), interval=seed_interval(gains), p=p, notes=tuple(notes))


def _missing(arm: Arm, other: Arm, planned: Sequence[str]) -> list[str]:
    if not arm.cells:
        return [f"no cell has the labels {label_text(arm.labels)}"]
    reasons = arm.missing(planned)
    return [f"{arm.name(other)}: seed {', '.join(seeds)} {reason}" for reason, seeds in reasons.items()]


def _obstacles(contrast: Contrast, pairs: Sequence[tuple[RunCell, RunCell]]) -> list[str]:
    """Why the two arms do not compare."""
    found = []
    if any(one.manifest["data_hash"] != other.manifest["data_hash"] for one, other in pairs):
        found.append("the training data differ")
    if contrast.equal == "steps":
        if any(one.manifest["steps"] != other.manifest["steps"] for one, other in pairs):
            found.append("the steps differ")
        return found
    equal = [same_compute(pair) for pair in pairs]
    if None in equal:
        found.append("the compute of the training is not known")
    elif not all(equal):
        found.append("the compute of the training differs")
    return found


def _by_number(seed: str) -> tuple[int, str]:
    return (int(seed), "") if seed.lstrip("-").isdigit() else (0, seed)
