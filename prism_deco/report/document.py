"""The report as Markdown, with its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prism_deco.report.plotting import Figure
from prism_deco.report.tabular import Table, escape, markdown, paragraph


@dataclass(frozen=True)
class PageSection:
    """A part of the report.

    Attributes:
        title: by default that of the first table.
        warnings: paragraphs above the tables, set off.
        folded: long tables, shown on demand.
        logs: last lines by the name of a cell.
    """

    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    warnings: Sequence[str] = ()
    folded: Sequence[Table] = ()
    logs: Mapping[str, str] = field(default_factory=dict)
    title: str = ""


def document(
    title: str, paragraphs: Sequence[str], sections: Sequence[PageSection]
) -> tuple[str, dict[str, str | bytes]]:
    """The Markdown, and SVG by the path under which it is named there."""
    figures: dict[str, str | bytes] = {}
    parts = [f"# {escape(title)}\n", *map(paragraph, paragraphs)]
    for number, section in enumerate(sections, start=1):
        parts.append(f"## {escape(section.title or section.tables[0].title)}\n")
        parts += [f"> {paragraph(text)}" for text in section.warnings]
        for table in section.tables:
            parts += [f"### {escape(table.title)}\n"] if table is not section.tables[0] else []
            parts.append(markdown(table))
        for figure in section.figures:
            path = f"figures/{figure.name}.svg"
            if path in figures:
                path = f"figures/{number}-{figure.name}.svg"
            figures[path] = figure.svg
            parts.append(f"![{escape(figure.caption or figure.name)}](<{path}>)\n")
        for table in section.folded:
            parts += [f"#### {escape(table.title)}\n", markdown(table)]
        for name, text in section.logs.items():
            quoted = "\n".join(f"    {line}" for line in text.splitlines())
            parts.append(f"#### Last log lines of {escape(name)}\n\n{quoted}\n")
    return "\n".join(parts), figures
