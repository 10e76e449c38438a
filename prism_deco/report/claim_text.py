"""The claims of a study in words: a page for readers without a browser."""

from __future__ import annotations

from collections.abc import Sequence

from prism_deco.report.cells import Cell
from prism_deco.report.claim_report import effect, is_clear, judging, with_deviation
from prism_deco.report.contrasts import HOLDS, MIXED, REVERSED, UNRESOLVED, Result, verdict
from prism_deco.report.hypotheses import EQUAL
from prism_deco.report.tables import p_value
from prism_deco.report.tabular import escape, number


def text(title: str, results: Sequence[Result], cells: Sequence[Cell], split: str) -> str:
    """Markdown: which claims hold, each with its numbers, and what they are about.

    Args:
        cells: of the study.
        split: of the benchmarks; empty is their own.
    """
    names = list(dict.fromkeys(result.claim.name for result in results))
    by_claim = {name: [result for result in results if result.claim.name == name] for name in names}
    parts = [f"# Claims of {escape(title)}", *_outcomes(by_claim), _method(results, split)]
    for name, own in by_claim.items():
        claim = own[0].claim
        parts.append(f"## {escape(name)}")
        parts += [f"The paper: {escape(claim.paper)}"] if claim.paper else []
        parts += [_paragraph(own, equal) for equal in EQUAL if judging(own, equal)]
        parts += [escape(claim.note)] if claim.note else []
    parts += ["## What this is about", _scope(cells)]
    return "\n\n".join(parts) + "\n"


def _outcomes(by_claim: dict[str, list[Result]]) -> list[str]:
    found = []
    for equal in EQUAL:
        verdicts = {name: verdict(own) for name, results in by_claim.items() if (own := judging(results, equal))}
        if not verdicts:
            continue
        lines = [f"At equal {equal}, of {len(verdicts)} claims:\n"]
        for kind in (HOLDS, REVERSED, MIXED, UNRESOLVED):
            names = [name for name, its in verdicts.items() if its == kind]
            lines.append(f"- {kind}: {escape('; '.join(names)) or 'none'}")
        found.append("\n".join(lines))
    return found


def _method(results: Sequence[Result], split: str) -> str:
    tested = sum(result.p is not None for result in results)
    clear = sum(is_clear(result) for result in results)
    found = sum(result.verdict != UNRESOLVED for result in results)
    where = f"the split {split}" if split else "the benchmarks' own split"
    return escape(
        f"Scores are those of {where}. Effects are differences paired by seed, with Student's 95 % interval over "
        "seeds; a contrast holds or is reversed where that interval leaves out zero (or the margin), and a claim where "
        f"all the contrasts that judge it do. {found} of {len(results)} contrasts do, and {clear} of them with p "
        f"below 0.05 after adjusting for all {tested} tests (Holm). Blind is the mean of models trained without their "
        "images. The contrasts that judge a claim follow; claims.csv has all of them."
    )


def _paragraph(results: Sequence[Result], equal: str) -> str:
    own = judging(results, equal)
    return f"**At equal {equal}: {verdict(own)}.**\n\n" + "\n".join(_sentence(result) for result in own)


def _sentence(result: Result) -> str:
    """A contrast with all its numbers, as an item of a list."""
    said = [f"{result.pair}, {result.words}, equal {result.contrast.equal}: {effect(result)}"]
    if result.effect is not None:
        said[0] += f", {len(result.seeds)} of {result.planned} seeds, p (Holm) {p_value(result.adjusted)}"
        blind = f", blind {number(result.blind.mean)}" if result.blind.mean is not None else ""
        said.append(f"{with_deviation(result.first)} against {with_deviation(result.second)}{blind}")
        said += result.notes
    if result.contrast.margin:
        said.append(f"margin {number(result.contrast.margin)}")
    if result.paper is not None:
        said.append(f"the paper's Table 1: {number(result.paper, sign='+')}")
    return f"- {escape('; '.join([*said, result.verdict]))}"


def _scope(cells: Sequence[Cell]) -> str:
    trained = [cell for cell in cells if cell.manifest]
    if not trained:
        return "Nothing has been trained yet."

    def span(values: Sequence[int]) -> str:
        least, most = min(values), max(values)
        return f"{least:,}" if least == most else f"{least:,} to {most:,}"

    def names(group: str) -> str:
        return ", ".join(dict.fromkeys(str(cell.config[group].name) for cell in trained if cell.config is not None))

    return escape(
        f"{len(trained)} models of {span([cell.manifest['params']['total'] for cell in trained])} parameters (tower "
        f"{names('backbone')}, LLM {names('llm')}), trained for {span([cell.manifest['steps'] for cell in trained])} "
        f"steps on {span([cell.manifest['samples'] for cell in trained])} records of {names('data')} with the recipe "
        f"{names('recipe')}. The intervals are over seeds, that is over initialisation and order of the data: they say "
        "how these projectors would compare if the same study were repeated with these learning rates and these "
        "questions, and nothing about others, nor about other towers, LLMs, data, lengths of training or sizes. A "
        "verdict here is no verdict on the paper's own models."
    )
