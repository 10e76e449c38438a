"""Tests claims on the runs of a study: differences paired by seed, with intervals and verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from claims import BENCHMARKS, RELEVANCE, Claim, Contrast
from scipy import stats

from prism_deco.errors import UsageError
from prism_deco.explain.gae import DEFAULT_METHOD
from prism_deco.report import paper
from prism_deco.report.benchmarks import family_of
from prism_deco.report.cells import RunCell
from prism_deco.report.comparability import same_compute
from prism_deco.report.stats import holm, seed_interval
from prism_deco.training.progress import THROUGH

HOLDS = "holds"
REVERSED = "reversed"
UNRESOLVED = "not resolved"

ALPHA = 0.05


@dataclass(frozen=True)
class Study:
    """The runs that claims are tested on.

    Attributes:
        benchmarks: of the study; a cell that was not scored on one of them has no mean.
        split: of the benchmarks; "" is their own.
    """

    cells: Sequence[RunCell]
    benchmarks: Sequence[str]
    split: str

    def benchmarks_of(self, measure: str) -> list[str]:
        """The benchmarks over which a measure is a mean."""
        choices = {name: choice for cell in self.cells for name, choice in cell.asked.items()}
        return [name for name in self.benchmarks if _belongs(measure, family_of(choices.get(name, name)))]

    def value(self, cell: RunCell, measure: str) -> float | None:
        """None where the cell was not measured, or not scored on all of the benchmarks."""
        if measure in RELEVANCE:
            found = cell.relevance.get("methods", {}).get(DEFAULT_METHOD, {}).get(measure)
            return 100 * float(found["mean"]) if found else None
        scores = cell.scores.get(self.split, {})
        own = self.benchmarks_of(measure)
        complete = own and all(name in scores for name in own)
        return fmean(scores[name].percent for name in own) if complete else None

    def values(self, cells: Iterable[RunCell], measure: str) -> dict[str, float]:
        """By seed, of the cells that were measured."""
        found = {cell.seed: self.value(cell, measure) for cell in cells}
        return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}

    def questions(self, cell: RunCell, measure: str) -> Any:
        """Identifies what a cell was asked; answers to different questions do not compare."""
        if measure in RELEVANCE:
            return [cell.relevance.get(key) for key in ("benchmark", "split", "n")]
        contents = [cell.scores[self.split][name].content for name in self.benchmarks_of(measure)]
        return [(content["data_hash"], content["prompt_hash"]) for content in contents]

    def arm(self, labels: Mapping[str, str], claim: str) -> dict[str, RunCell]:
        """By seed, the cells that have these labels; those trained blind only where the labels say so."""
        blind = labels.get("recipe.blind", "").lower() == "true"
        wanted = {key: value for key, value in labels.items() if key != "recipe.blind"}
        found: dict[str, RunCell] = {}
        for cell in self.cells:
            if cell.blind != blind or not wanted.items() <= dict(cell.labels).items():
                continue
            if cell.seed in found:
                raise UsageError(
                    f"The claim {claim!r} means either {found[cell.seed].id} or {cell.id}: both have the labels "
                    f"{label_text(labels)}. Add a label that tells them apart."
                )
            found[cell.seed] = cell
        return found


def _belongs(measure: str, family: str) -> bool:
    return measure == "mean" or (family == "refcoco") == (measure == "boxes")


def contrast_records(claims: Sequence[Claim], study: Study) -> list[dict[str, Any]]:
    """A record per contrast and measure, in the claims' order.

    `effect` is the mean over the seeds that both arms have of first minus second, with its 95 % interval by Student's
    t; `p` is of a t test against the contrast's null, `p_holm` adjusted for all records; `paper_table1` the same
    difference in the paper. What is not available is None, and `notes` say why.

    Raises:
        UsageError: the labels of an arm are those of several cells of one seed.
    """
    records = []
    for claim in claims:
        for contrast in claim.contrasts:
            records += [_record(claim, contrast, measure, study) for measure in contrast.measures]
    adjusted = holm([record["p"] for record in records])
    for record, p in zip(records, adjusted, strict=True):
        record["p_holm"] = p
        record["after_holm"] = record["verdict"] != UNRESOLVED and p is not None and p < ALPHA
    return records


def _record(claim: Claim, contrast: Contrast, measure: str, study: Study) -> dict[str, Any]:
    first_arm = study.arm(contrast.first, claim.name)
    second_arm = study.arm(contrast.second, claim.name)
    first = study.values(first_arm.values(), measure)
    second = study.values(second_arm.values(), measure)
    blind = study.values((cell for cell in study.cells if cell.blind), measure)

    planned = sorted({*first_arm, *second_arm}, key=lambda seed: (int(seed) if seed.isdigit() else 0, seed))
    seeds = [seed for seed in planned if seed in first and seed in second]
    pairs = [(first_arm[seed], second_arm[seed]) for seed in seeds]
    obstacles = _obstacles(contrast, measure, pairs, study)
    gains = [] if obstacles else [first[seed] - second[seed] for seed in seeds]
    low, high = seed_interval(gains) if len(gains) > 1 else (None, None)

    notes = _missing(contrast.first, first_arm, first, planned) + _missing(contrast.second, second_arm, second, planned)
    for labels, values in ((contrast.first, first), (contrast.second, second)):
        if gains and measure in BENCHMARKS and not _is_above(values, blind):
            notes.append(f"{label_text(labels)} is not clearly above the blind model")
    if len(gains) == 1:
        notes.append("one seed has no interval")
    return {
        "claim": claim.name,
        "first": label_text(contrast.first),
        "second": label_text(contrast.second),
        "measure": measure,
        "unit": "points" if measure in BENCHMARKS else "hundredths",
        "judged": contrast.judges and measure == contrast.measures[0],
        "equal": contrast.equal,
        "expect": contrast.expect,
        "margin": contrast.margin,
        "effect": fmean(gains) if gains else None,
        "low95": low,
        "high95": high,
        "seeds": " ".join(seeds),
        "planned_seeds": len(planned),
        **_summary("first", first),
        **_summary("second", second),
        **_summary("blind", blind),
        "paper_table1": _paper_difference(contrast, measure),
        "p": t_test(gains, -contrast.margin) if len(gains) > 1 else None,
        "p_holm": None,
        "verdict": _verdict(low, high, -contrast.margin),
        "after_holm": False,
        "notes": "; ".join([*notes, *obstacles]),
    }


def t_test(values: Sequence[float], null: float = 0.0) -> float:
    """Two-sided p-value of Student's t for the mean of at least two independent values.

    It is below 0.05 exactly where `seed_interval` leaves `null` out.
    """
    if min(values) == max(values):  # scipy's test of equal values is nan
        return 1.0 if values[0] == null else 0.0
    result: Any = stats.ttest_1samp(values, null)
    return float(result.pvalue)


def label_text(labels: Mapping[str, str]) -> str:
    """Labels as on a command line."""
    return " ".join(f"{key}={value}" for key, value in labels.items())


def _missing(
    labels: Mapping[str, str], arm: Mapping[str, RunCell], values: Mapping[str, float], planned: Sequence[str]
) -> list[str]:
    """Which of the planned seeds have no value and why."""
    if not arm:
        return [f"no cell has the labels {label_text(labels)}"]
    reasons: dict[str, list[str]] = {}
    for seed in planned:
        if seed not in values:
            state = arm[seed].state if seed in arm else "not planned"
            reasons.setdefault("not measured" if state in THROUGH else state, []).append(seed)
    return [f"{label_text(labels)}: seed {', '.join(seeds)} {reason}" for reason, seeds in reasons.items()]


def _obstacles(contrast: Contrast, measure: str, pairs: Sequence[tuple[RunCell, RunCell]], study: Study) -> list[str]:
    """Why the two arms do not compare."""
    found = []
    if any(one.manifest["data_hash"] != other.manifest["data_hash"] for one, other in pairs):
        found.append("the training data differ")
    if any(study.questions(one, measure) != study.questions(other, measure) for one, other in pairs):
        found.append("the questions differ")
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


def _is_above(values: Mapping[str, float], baseline: Mapping[str, float]) -> bool:
    """Whether an arm is clearly above the baseline, seed by seed; with fewer than two common seeds nothing is said."""
    gains = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    return len(gains) < 2 or seed_interval(gains)[0] > 0


def _verdict(low: float | None, high: float | None, null: float) -> str:
    """By the interval alone: `holds` above the null, `reversed` below it."""
    if low is None or high is None or low <= null <= high:
        return UNRESOLVED
    return HOLDS if low > null else REVERSED


def _summary(name: str, values: Mapping[str, float]) -> dict[str, Any]:
    return {
        f"{name}_mean": fmean(values.values()) if values else None,
        f"{name}_deviation": stdev(values.values()) if len(values) > 1 else None,
        f"{name}_seeds": len(values),
    }


def _paper_difference(contrast: Contrast, measure: str) -> float | None:
    """The same difference in the paper's Table 1, over the columns that Table 3 has as well: those of the miniature.

    None where the table does not have both projectors. They are as they are: with further labels an arm is not one.
    """
    first, second = (labels.get("projector", "") for labels in (contrast.first, contrast.second))
    printed = {row.projector: row.scores for row in paper.rows(1) if not row.cited}
    as_printed = {*contrast.first, *contrast.second} <= {"part", "projector"}
    if not as_printed or measure in RELEVANCE or first not in printed or second not in printed:
        return None
    names = [name for name in paper.COLUMNS[3] if _belongs(measure, family_of(name))]
    return fmean(printed[first][name] - printed[second][name] for name in names)


def joint_verdict(records: Sequence[Mapping[str, Any]]) -> str:
    """Of several contrasts: holds or reversed where all do, mixed where some hold and others are reversed."""
    verdicts = {record["verdict"] for record in records}
    if {HOLDS, REVERSED} <= verdicts:
        return "mixed"
    return verdicts.pop() if len(verdicts) == 1 else UNRESOLVED
