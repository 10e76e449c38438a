"""Tables of claims: what became of each, and the contrasts behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prism_deco.report.arms import Arm, label_text
from prism_deco.report.contrasts import (
    ALPHA,
    HOLDS,
    MIXED,
    REVERSED,
    UNRESOLVED,
    ContrastResult,
    joint_verdict,
)
from prism_deco.report.hypotheses import EQUAL
from prism_deco.report.tables import format_p
from prism_deco.report.tabular import MISSING, Field, Table, format_interval, format_number, under_headings

SCOPE = (
    "The intervals are over seeds, that is over initialisation and data order: they say how these projectors would "
    "compare if the same study were repeated with these learning rates and these questions, and nothing about other "
    "towers, LLMs, data, training lengths or sizes. A verdict here is no verdict on the paper's own models."
)


def by_claim(results: Sequence[ContrastResult]) -> dict[str, list[ContrastResult]]:
    """Claim by claim, what judges before the details."""
    found: dict[str, list[ContrastResult]] = {}
    for result in sorted(results, key=lambda result: not result.judged):
        found.setdefault(result.claim.name, []).append(result)
    return {name: found[name] for name in dict.fromkeys(result.claim.name for result in results)}


def outcome_sentences(results: Sequence[ContrastResult]) -> list[str]:
    """Which claims hold, at equal steps and at equal compute."""
    found = []
    for equal in EQUAL:
        verdicts = {name: _judging(own, equal) for name, own in by_claim(results).items()}
        parts = []
        for kind in (HOLDS, REVERSED, MIXED, UNRESOLVED):
            names = [name for name, own in verdicts.items() if own and joint_verdict(own) == kind]
            parts.append(f"{kind}: {'; '.join(names) or 'none'}")
        if any(verdicts.values()):
            found.append(f"At equal {equal}: {'. '.join(parts)}.")
    return found


def claims_table(results: Sequence[ContrastResult]) -> Table:
    """A row per claim: its verdict at equal steps and at equal compute."""
    used = [equal for equal in EQUAL if any(result.contrast.equal == equal for result in results)]
    rows = []
    for name, own in by_claim(results).items():
        claim = own[0].claim
        about = [f"The paper: {claim.paper}" if claim.paper else "", claim.note]
        rows.append([Field(name, tuple(filter(None, about))), *(_verdict(_judging(own, equal)) for equal in used)])
    caption = (
        "A claim holds, or is reversed, where all the contrasts that judge it do by their 95 % intervals over seeds; "
        "mixed: some hold, others are reversed; not resolved: an interval includes zero (or the margin), or there is "
        "none. In smaller print what the paper says, the contrasts that judge it (first minus second), and how many "
        f"of them remain clear after adjusting p for all {_tested(results)} contrasts (Holm, below {ALPHA})."
    )
    return Table("Claims", ["claim", *(f"equal {equal}" for equal in used)], rows, caption=caption)


def _judging(results: Sequence[ContrastResult], equal: str) -> list[ContrastResult]:
    """Those that judge a claim where both arms were given the same steps, or the same compute."""
    return [result for result in results if result.judged and result.contrast.equal == equal]


def _verdict(judging: Sequence[ContrastResult]) -> Field:
    if not judging:
        return Field(MISSING)
    lines = [f"{result.pair}: {_effect(result)}" for result in judging]
    lines.append(f"{sum(result.is_clear for result in judging)} of {len(judging)} after Holm")
    lines += dict.fromkeys(note for result in judging if result.effect is not None for note in result.notes)
    verdict = joint_verdict(judging)
    return Field(verdict, tuple(lines), best=verdict in (HOLDS, REVERSED))


def _effect(result: ContrastResult) -> str:
    """`+3.1 (+1.2 to +5.0)`; why there is none where there is none."""
    if result.effect is None:
        return "; ".join(result.notes) or MISSING
    bounds = f" ({format_interval(result.interval, sign='+')})" if result.interval else ""
    return f"{format_number(result.effect, sign='+')}{bounds}"


def contrasts_table(results: Sequence[ContrastResult]) -> Table:
    """A row per contrast and outcome, those that judge a claim first."""
    rows = []
    for name, own in by_claim(results).items():
        for result in own:
            margin = result.contrast.margin
            fields = [
                Field(result.pair, result.notes),
                Field(result.verdict, best=result.is_clear),
                Field(outcome_label(result), (f"margin {format_number(margin)}",) if margin else ()),
                Field(result.contrast.equal),
                *map(Field, result_texts(result)),
                Field(f"{len(result.seeds)} of {len(result.planned)}"),
                Field(format_number(result.paper, sign="+")),
            ]
            rows.append((Field(name), fields))
    columns = ["contrast", "verdict", "measure", "equal", *TEXTS, "seeds", "paper"]
    caption = (
        "First minus second, paired by seed: mean difference and Student's t interval over the seeds that both have. "
        "Benchmarks: their mean in points (per cent). Relevance in hundredths: the fraction of R-GAE's relevance in "
        "the box, the fraction of hits in the pointing game, the cosine of two visual tokens' maps, and the spread as "
        "a fraction of the grid's side. First, second and blind: means over all of an arm's seeds ± their standard "
        "deviation; blind is trained without the images. Paper: the same difference in Table 1, over the columns that "
        "the miniature has. In brackets: details, by which no claim is judged. p (Holm): t test against zero, or "
        "against minus the margin where the claim is 'not worse by more than that', adjusted for all "
        f"{_tested(results)} tests. Bold: below {ALPHA}."
    )
    return Table("Contrasts", columns, under_headings(rows), heads=2, caption=caption)


TEXTS = ("effect", "95 % over seeds", "first", "second", "blind", "p (Holm)")
"""What `result_texts` gives."""


def result_texts(result: ContrastResult) -> list[str]:
    """The numbers of a contrast, for tables and figures."""
    return [
        format_number(result.effect, sign="+"),
        format_interval(result.interval, sign="+"),
        _with_deviation(result.first),
        _with_deviation(result.second),
        format_number(result.blind.mean),
        format_p(result.adjusted),
    ]


def outcome_label(result: ContrastResult) -> str:
    return result.label if result.judged else f"({result.label})"


def _with_deviation(arm: Arm) -> str:
    """`35.6 ±0.4`."""
    spread = f" ±{format_number(arm.deviation)}" if arm.deviation is not None else ""
    return f"{format_number(arm.mean)}{spread}"


def claim_records(results: Sequence[ContrastResult]) -> list[dict[str, Any]]:
    """A record per contrast and outcome, for CSV."""
    found = []
    for result in results:
        low, high = result.interval or (None, None)
        found.append(
            {
                "claim": result.claim.name,
                "first": label_text(result.contrast.first),
                "second": label_text(result.contrast.second),
                "measure": result.measure,
                "unit": result.unit,
                "judged": result.judged,
                "equal": result.contrast.equal,
                "expect": result.contrast.expect,
                "margin": result.contrast.margin,
                "effect": result.effect,
                "low95": low,
                "high95": high,
                "seeds": " ".join(result.seeds),
                "planned_seeds": len(result.planned),
                **_means("first", result.first),
                **_means("second", result.second),
                **_means("blind", result.blind),
                "paper_table1": result.paper,
                "p": result.p,
                "p_holm": result.adjusted,
                "verdict": result.verdict,
                "after_holm": result.is_clear,
                "notes": "; ".join(result.notes),
            }
        )
    return found


def _means(name: str, arm: Arm) -> dict[str, Any]:
    return {f"{name}_mean": arm.mean, f"{name}_deviation": arm.deviation, f"{name}_seeds": len(arm.values)}


def _tested(results: Sequence[ContrastResult]) -> int:
    return sum(result.p is not None for result in results)
