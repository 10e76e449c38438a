"""Tables of claims: what became of each, and the contrasts behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from claims import EQUAL, Claim
from contrasts import ALPHA, HOLDS, REVERSED, joint_verdict

from prism_deco.report.tables import format_p
from prism_deco.report.tabular import MISSING, Field, Table, format_interval, format_number, under_headings

Record = Mapping[str, Any]
"""One of `contrast_records`."""

SCOPE = (
    "The intervals are over seeds, that is over initialisation and data order: they say how these projectors would "
    "compare if the same study were repeated with these learning rates and these questions, and nothing about other "
    "towers, LLMs, data, training lengths or sizes. A verdict here is no verdict on the paper's own models."
)

TEXTS = ("effect", "95 % over seeds", "first", "second", "blind", "p (Holm)")
"""What `contrast_texts` gives."""


def by_claim(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Claim by claim, what judges before the details."""
    found: dict[str, list[Record]] = {record["claim"]: [] for record in records}
    for record in sorted(records, key=lambda record: not record["judged"]):
        found[record["claim"]].append(record)
    return found


def claims_table(claims: Sequence[Claim], records: Sequence[Record]) -> Table:
    """A row per claim: its verdict at equal steps and at equal compute."""
    used = [equal for equal in EQUAL if any(record["equal"] == equal for record in records)]
    rows = []
    for claim in claims:
        own = [record for record in records if record["claim"] == claim.name and record["judged"]]
        about = [f"The paper: {claim.paper}" if claim.paper else "", claim.note]
        verdicts = [_verdict([record for record in own if record["equal"] == equal]) for equal in used]
        rows.append([Field(claim.name, tuple(filter(None, about))), *verdicts])
    caption = (
        "A claim holds, or is reversed, where all the contrasts that judge it do by their 95 % intervals over seeds; "
        "mixed: some hold, others are reversed; not resolved: an interval includes zero (or the margin), or there is "
        "none. In smaller print what the paper says, the contrasts that judge it (first minus second), and how many "
        f"of them remain clear after adjusting p for all {_tested(records)} contrasts (Holm, below {ALPHA})."
    )
    return Table("Claims", ["claim", *(f"equal {equal}" for equal in used)], rows, caption, words=True)


def _verdict(judging: Sequence[Record]) -> Field:
    if not judging:
        return Field(MISSING)
    lines = []
    for record in judging:
        bounds = format_interval((record["low95"], record["high95"]), sign="+") if record["p"] is not None else ""
        effect = format_number(record["effect"], sign="+") if record["effect"] is not None else record["notes"]
        lines.append(f"{pair(record)}: {effect}{f' ({bounds})' if bounds else ''}")
    lines.append(f"{sum(record['after_holm'] for record in judging)} of {len(judging)} after Holm")
    lines += dict.fromkeys(record["notes"] for record in judging if record["notes"] and record["effect"] is not None)
    verdict = joint_verdict(judging)
    return Field(verdict, tuple(lines), best=verdict in (HOLDS, REVERSED))


def contrasts_table(records: Sequence[Record]) -> Table:
    """A row per contrast and measure, those that judge a claim first."""
    rows = []
    for name, own in by_claim(records).items():
        for record in own:
            margin = f"margin {format_number(record['margin'])}" if record["margin"] else ""
            fields = [
                Field(pair(record), (record["notes"],) if record["notes"] else ()),
                Field(record["verdict"], best=record["after_holm"]),
                Field(measure(record), (margin,) if margin else ()),
                Field(record["equal"]),
                *map(Field, contrast_texts(record)),
                Field(f"{len(record['seeds'].split())} of {record['planned_seeds']}"),
                Field(format_number(record["paper_table1"], sign="+")),
            ]
            rows.append((Field(name), fields))
    columns = ["contrast", "verdict", "measure", "equal", *TEXTS, "seeds", "paper"]
    caption = (
        "First minus second, paired by seed: mean difference and Student's t interval over the seeds that both have. "
        "mean, boxes, questions: of all benchmarks, those that ask for boxes and the others, in points (per cent). The "
        "others are R-GAE's, in hundredths: the fraction of relevance in the box, the fraction of hits in the pointing "
        "game, the cosine of two visual tokens' maps, and the spread as a fraction of the grid's side. First, second "
        "and blind: means over all of an arm's seeds ± their standard deviation; blind is trained without the images. "
        "Paper: the same difference in Table 1, over the columns of the miniature. In brackets: details, by which "
        "no claim is judged. p (Holm): t test against zero, or against minus the margin where the claim is 'not worse "
        f"by more than that', adjusted for all {_tested(records)} tests. Bold: below {ALPHA}."
    )
    return Table("Contrasts", columns, under_headings(rows), caption=caption)


def pair(record: Record) -> str:
    """`steps avgpool − steps linear`, by the labels of the two arms."""
    arms = [" ".join(label.partition("=")[2] for label in record[arm].split()) for arm in ("first", "second")]
    return " − ".join(arms)  # noqa: RUF001


def measure(record: Record) -> str:
    return record["measure"] if record["judged"] else f"({record['measure']})"


def contrast_texts(record: Record) -> list[str]:
    """The numbers of a contrast, for tables and figures."""
    return [
        format_number(record["effect"], sign="+"),
        format_interval((record["low95"], record["high95"]), sign="+") if record["p"] is not None else MISSING,
        _with_deviation(record, "first"),
        _with_deviation(record, "second"),
        format_number(record["blind_mean"]),
        format_p(record["p_holm"]),
    ]


def _with_deviation(record: Record, arm: str) -> str:
    """`35.6 ±0.4`."""
    deviation = record[f"{arm}_deviation"]
    spread = f" ±{format_number(deviation)}" if deviation is not None else ""
    return f"{format_number(record[f'{arm}_mean'])}{spread}"


def _tested(records: Sequence[Record]) -> int:
    return sum(record["p"] is not None for record in records)
