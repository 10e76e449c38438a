"""Tables of claims: what became of each, and the contrasts behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prism_deco.report.arms import Side, words
from prism_deco.report.contrasts import MIXED, UNRESOLVED, Result, verdict
from prism_deco.report.hypotheses import EQUAL
from prism_deco.report.tables import p_value
from prism_deco.report.tabular import MISSING, Field, Table, interval, number

_ALPHA = 0.05


def summary(results: Sequence[Result]) -> Table:
    """A row per claim: its verdict at equal steps and at equal compute."""
    used = [equal for equal in EQUAL if any(result.contrast.equal == equal for result in results)]
    rows = []
    for name in dict.fromkeys(result.claim.name for result in results):
        own = [result for result in results if result.claim.name == name]
        claim = own[0].claim
        about = (*([f"The paper: {claim.paper}"] if claim.paper else []), *([claim.note] if claim.note else []))
        rows.append([Field(name, about), *(_verdict(own, equal) for equal in used)])
    caption = (
        "A claim holds, or is reversed, where all the contrasts that judge it do by their 95 % intervals over seeds; "
        "mixed: some hold, others are reversed; not resolved: an interval includes zero (or the margin), or there is "
        "none. In smaller print what the paper says, the contrasts that judge it (first minus second), and how many "
        f"of them remain clear after adjusting p for all {_tested(results)} contrasts (Holm, below {_ALPHA})."
    )
    columns = ["claim", *(f"equal {equal}" for equal in used)]
    return Table("Claims", columns, rows, caption=caption, starts=frozenset(range(len(rows))))


def judging(results: Sequence[Result], equal: str) -> list[Result]:
    """Those that a claim is judged by where both sides were given the same steps, or the same compute."""
    return [result for result in results if result.judged and result.contrast.equal == equal]


def _verdict(results: Sequence[Result], equal: str) -> Field:
    own = judging(results, equal)
    if not own:
        return Field(MISSING)
    lines = [f"{result.pair}: {effect(result)}" for result in own]
    clear = sum(is_clear(result) for result in own)
    lines.append(f"{clear} of {len(own)} after Holm")
    lines += dict.fromkeys(note for result in own if result.effect is not None for note in result.notes)
    found = verdict(own)
    return Field(found, tuple(lines), best=found not in (UNRESOLVED, MIXED), muted=found == UNRESOLVED)


def effect(result: Result) -> str:
    """`+3.1 (+1.2 to +5.0)`; why there is none where there is none."""
    if result.effect is None:
        return "; ".join(result.notes) or MISSING
    bounds = f" ({interval(result.interval, sign='+')})" if result.interval else ""
    return f"{number(result.effect, sign='+')}{bounds}"


def is_clear(result: Result) -> bool:
    """Whether a verdict stands after the adjustment for all contrasts."""
    return result.verdict != UNRESOLVED and result.adjusted is not None and result.adjusted < _ALPHA


def contrasts(results: Sequence[Result]) -> Table:
    """A row per contrast and measure, those that judge a claim first."""
    rows, starts, previous = [], set(), ""
    for result in ordered(results):
        first, previous = result.claim.name != previous, result.claim.name
        if first:
            starts.add(len(rows))
        null = f"margin {number(result.contrast.margin)}" if result.contrast.margin else ""
        rows.append(
            [
                Field(result.claim.name if first else ""),
                Field(result.pair, result.notes),
                Field(result.words if result.judged else f"({result.words})", (null,) if null else ()),
                Field(result.contrast.equal),
                Field(number(result.effect, sign="+")),
                Field(interval(result.interval, sign="+")),
                Field(f"{len(result.seeds)} of {result.planned}"),
                Field(with_deviation(result.first)),
                Field(with_deviation(result.second)),
                Field(number(result.blind.mean)),
                Field(number(result.paper, sign="+")),
                Field(p_value(result.adjusted), best=is_clear(result)),
                Field(result.verdict, best=is_clear(result), muted=result.verdict == UNRESOLVED),
            ]
        )
    columns = ["claim", "contrast", "measure", "equal", "effect", "95 % over seeds", "seeds", "first", "second"]
    columns += ["blind", "paper", "p (Holm)", "verdict"]
    caption = (
        "First minus second, paired by seed: mean difference and Student's t interval over the seeds that both have. "
        "Benchmarks: their mean in points (per cent). Relevance in hundredths: R-GAE's share of relevance inside the "
        "box, share of hits in the pointing game, cosine of two visual tokens' maps, and spread in shares of the "
        "grid's side. First, second and blind: means over all of a side's seeds ± their standard deviation; blind is "
        "trained without the images. Paper: the same difference in Table 1, over the columns that the miniature has. "
        "In brackets: details, by which no claim is judged. p (Holm): t test against zero, or against minus the margin "
        f"where the claim is 'not worse by more than that', adjusted for all {_tested(results)} tests. Bold: below "
        f"{_ALPHA}."
    )
    return Table("Contrasts", columns, rows, heads=4, caption=caption, starts=frozenset(starts))


def with_deviation(side: Side) -> str:
    """`35.6 ±0.4`."""
    spread = f" ±{number(side.deviation)}" if side.deviation is not None else ""
    return f"{number(side.mean)}{spread}"


def records(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A record per contrast and measure, for CSV."""
    found = []
    for result in results:
        low, high = result.interval or (None, None)
        found.append(
            {
                "claim": result.claim.name,
                "first": words(result.contrast.first),
                "second": words(result.contrast.second),
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
                "planned_seeds": result.planned,
                **_means("first", result.first),
                **_means("second", result.second),
                **_means("blind", result.blind),
                "paper_table1": result.paper,
                "p": result.p,
                "p_holm": result.adjusted,
                "verdict": result.verdict,
                "after_holm": is_clear(result),
                "notes": "; ".join(result.notes),
            }
        )
    return found


def _means(name: str, side: Side) -> dict[str, Any]:
    return {f"{name}_mean": side.mean, f"{name}_deviation": side.deviation, f"{name}_seeds": len(side.values)}


def ordered(results: Sequence[Result]) -> list[Result]:
    """Claim by claim, what judges before the details."""
    names = list(dict.fromkeys(result.claim.name for result in results))
    return sorted(results, key=lambda result: (names.index(result.claim.name), not result.judged))


def _tested(results: Sequence[Result]) -> int:
    return sum(result.p is not None for result in results)
