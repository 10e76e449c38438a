"""Tests claims on the cells of a study: differences paired by seed, with intervals and verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from prism_deco.errors import UsageError
from prism_deco.report.benchmarks import families_of
from prism_deco.report.cells import RunCell
from prism_deco.report.compute import same_compute
from prism_deco.report.hypotheses import Claim, Contrast
from prism_deco.report.outcomes import OUTCOMES
from prism_deco.report.stats import holm, seed_interval, t_test
from prism_deco.training.status import THROUGH

HOLDS = "holds"
REVERSED = "reversed"
UNRESOLVED = "not resolved"

ALPHA = 0.05

Values = Mapping[str, float]
"""An outcome by seed."""


def contrast_records(
    claims: Sequence[Claim], cells: Sequence[RunCell], benchmarks: Sequence[str], split: str
) -> list[dict[str, Any]]:
    """A record per contrast and measure, in the claims' order.

    `effect` is the mean over the seeds that both arms have of first minus second, with its 95 % interval by Student's
    t; `p` is of a t test against the contrast's null, `p_holm` adjusted for all records; `paper_table1` the same
    difference in the paper. What is not available is None, and `notes` say why.

    Args:
        cells: of one study.
        benchmarks: of the study; a cell that was not scored on one of them has no mean.

    Raises:
        UsageError: the labels of an arm are those of several cells of one seed.
    """
    families = families_of(cells, benchmarks)
    records = []
    for claim in claims:
        for contrast in claim.contrasts:
            records += [_record(claim, contrast, measure, cells, families, split) for measure in contrast.measures]
    adjusted = holm([record["p"] for record in records])
    for record, p in zip(records, adjusted, strict=True):
        record["p_holm"] = p
        record["after_holm"] = record["verdict"] != UNRESOLVED and p is not None and p < ALPHA
    return records


def _record(
    claim: Claim,
    contrast: Contrast,
    measure: str,
    cells: Sequence[RunCell],
    families: Mapping[str, str],
    split: str,
) -> dict[str, Any]:
    outcome = OUTCOMES[measure]

    def read(own: Iterable[RunCell]) -> dict[str, float]:
        values = {cell.seed: outcome.read(cell, families, split) for cell in own}
        return {seed: value for seed, value in values.items() if value is not None and math.isfinite(value)}

    arms = [_choose(cells, labels, claim.name) for labels in (contrast.first, contrast.second)]
    first, second = (read(arm.values()) for arm in arms)
    blind = read(cell for cell in cells if cell.blind)
    planned = sorted({*arms[0], *arms[1]}, key=lambda seed: (int(seed) if seed.isdigit() else 0, seed))
    seeds = [seed for seed in planned if seed in first and seed in second]
    pairs = [(arms[0][seed], arms[1][seed]) for seed in seeds]
    asked = [[outcome.questions(cell, families, split) for cell in pair] for pair in pairs]
    obstacles = _obstacles(contrast, pairs, asked)
    notes = [*_missing(contrast.first, arms[0], first, planned), *_missing(contrast.second, arms[1], second, planned)]
    gains = [] if obstacles else [first[seed] - second[seed] for seed in seeds]
    if gains and not outcome.relevance:
        for labels, values in ((contrast.first, first), (contrast.second, second)):
            if _is_above(values, blind) is False:
                notes.append(f"{label_text(labels)} is not clearly above the blind model")
    low, high = seed_interval(gains) if len(gains) > 1 else (None, None)
    if len(gains) == 1:
        notes.append("one seed has no interval")
    return {
        "claim": claim.name,
        "first": label_text(contrast.first),
        "second": label_text(contrast.second),
        "measure": measure,
        "unit": outcome.unit,
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


def _choose(cells: Iterable[RunCell], labels: Mapping[str, str], claim: str) -> dict[str, RunCell]:
    """An arm: by seed, the cells that have these labels; those trained blind only where the labels say so."""
    blind = labels.get("recipe.blind", "").lower() == "true"
    wanted = {key: value for key, value in labels.items() if key != "recipe.blind"}
    found: dict[str, RunCell] = {}
    for cell in cells:
        if cell.blind == blind and wanted.items() <= dict(cell.labels).items():
            if cell.seed in found:
                raise UsageError(
                    f"The claim {claim!r} means either {found[cell.seed].id} or {cell.id}: both have the labels "
                    f"{label_text(labels)}. Add a label that tells them apart."
                )
            found[cell.seed] = cell
    return found


def label_text(labels: Mapping[str, str]) -> str:
    """Labels as on a command line."""
    return " ".join(f"{key}={value}" for key, value in labels.items())


def _missing(
    labels: Mapping[str, str], arm: Mapping[str, RunCell], values: Values, planned: Sequence[str]
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


def _obstacles(
    contrast: Contrast, pairs: Sequence[tuple[RunCell, RunCell]], asked: Sequence[Sequence[object]]
) -> list[str]:
    """Why the two arms do not compare."""
    found = []
    if any(one.manifest["data_hash"] != other.manifest["data_hash"] for one, other in pairs):
        found.append("the training data differ")
    if any(one != other for one, other in asked):
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


def _is_above(values: Values, baseline: Values) -> bool | None:
    """Whether an arm is clearly above the baseline, seed by seed; None with fewer than two common seeds."""
    gains = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    return seed_interval(gains)[0] > 0 if len(gains) > 1 else None


def _verdict(low: float | None, high: float | None, null: float) -> str:
    """By the interval alone: `holds` above the null, `reversed` below it."""
    if low is None or high is None or low <= null <= high:
        return UNRESOLVED
    return HOLDS if low > null else REVERSED


def _summary(name: str, values: Values) -> dict[str, Any]:
    return {
        f"{name}_mean": fmean(values.values()) if values else None,
        f"{name}_deviation": stdev(values.values()) if len(values) > 1 else None,
        f"{name}_seeds": len(values),
    }


def _paper_difference(contrast: Contrast, measure: str) -> float | None:
    """The paper's projectors are as they are: with further labels an arm is not one of them."""
    if not {*contrast.first, *contrast.second} <= {"part", "projector"}:
        return None
    projectors = [labels.get("projector", "") for labels in (contrast.first, contrast.second)]
    return OUTCOMES[measure].paper_difference(*projectors)
