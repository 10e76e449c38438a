"""The report as Markdown, with its figures beside it."""

from __future__ import annotations

from collections.abc import Sequence

from prism_deco.report.html_page import Report
from prism_deco.report.plotting import Figure
from prism_deco.report.tabular import escape, markdown


def named(report: Report) -> list[tuple[str, Figure]]:
    """All figures with the names of their files."""
    several = len(report.sections) > 1
    found = [
        (f"{number}-{figure.name}" if several else figure.name, figure)
        for number, section in enumerate(report.sections, start=1)
        for figure in section.figures
    ]
    return found + [(figure.name, figure) for figure in report.curves]


def document(report: Report) -> str:
    """The Markdown; every text in it is escaped."""
    names = {id(figure): name for name, figure in named(report)}

    def pictures(drawn: Sequence[Figure]) -> list[str]:
        return [f"![{escape(one.caption or one.name)}](<figures/{names[id(one)]}.svg>)\n" for one in drawn]

    parts = [f"# {escape(report.title)}\n", escape(" ".join([report.progress, *report.notes])) + "\n"]
    if report.unfinished:
        parts.append(markdown(report.unfinished, 2))
        for name, text in report.logs:
            quoted = "\n".join(f"    {line}" for line in text.splitlines())
            parts.append(f"Last log lines of {escape(name)}:\n\n{quoted}\n")
    for section in report.sections:
        first, *others = section.tables
        parts += [f"**Not comparable:** {escape(warning)}\n" for warning in section.warnings]
        parts += [f"**Other settings:** {escape(line)}\n" for line in section.departures]
        parts += [markdown(first, 2), *(markdown(table) for table in (*others, *section.folded))]
        parts += pictures(section.figures)
    if report.curves:
        parts += ["## Curves of single cells\n", *pictures(report.curves)]
    if report.cells:
        parts.append(markdown(report.cells, 2))
    return "\n".join(parts)
