"""The report as Markdown, with its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from prism_deco.report import curve_figures, status_tables
from prism_deco.report.cells import RunCell
from prism_deco.report.plotting import Figure
from prism_deco.report.tabular import Table, escape, markdown, paragraph

MOST_CURVES = 40
"""Above that many cells, curves are drawn of unfinished cells only."""


@dataclass(frozen=True)
class PageSection:
    """A part of the report, under the title of its first table.

    Attributes:
        notes: paragraphs above the tables; warnings are set off.
        folded: long tables, shown on demand.
    """

    tables: Sequence[Table]
    figures: Sequence[Figure] = ()
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    folded: Sequence[Table] = ()


def about(cells: Sequence[RunCell]) -> list[str]:
    """A paragraph on which models were trained, when, and by which version."""
    trained = [cell for cell in cells if cell.manifest]
    if not trained:
        return []

    def names(group: str) -> str:
        return ", ".join(dict.fromkeys(str(cell.config[group].name) for cell in trained if cell.config is not None))

    models = f"{len(trained)} {'model' if len(trained) == 1 else 'models'}"
    params = _span([cell.manifest["params"]["total"] for cell in trained])
    steps = _span([cell.manifest["steps"] for cell in trained])
    samples = _span([cell.manifest["samples"] for cell in trained])
    versions = ", ".join(dict.fromkeys(str(cell.manifest.get("code_version", "?")) for cell in trained))
    days = sorted({datetime.fromtimestamp(cell.started, UTC).date() for cell in trained if cell.started})
    when = f" between {days[0]} and {days[-1]}" if len(days) > 1 else "".join(f" on {day}" for day in days)
    return [
        f"{models} of {params} parameters (vision backbone {names('backbone')}, LLM {names('llm')}), trained{when} "
        f"with prism_deco {versions} for {steps} steps on {samples} records of {names('data')}, recipe "
        f"{names('recipe')}."
    ]


def _span(values: Sequence[int]) -> str:
    least = f"{min(values):,}"
    most = f"{max(values):,}"
    return least if least == most else f"{least} to {most}"


def notes(cells: Sequence[RunCell], split: str, others: Sequence[str]) -> str:
    """A paragraph on the state of the cells, and on what is shown of them.

    Args:
        split: that is shown; "" is the benchmarks' own.
        others: that were scored as well.
    """
    if not cells:
        return (
            "There are no cells. Nothing was planned or run here yet: start with prism-deco sweep or prism-deco train."
        )
    found = [status_tables.progress(cells), f"Split: {split or 'the benchmarks’ own'}."]  # noqa: RUF001
    if others:
        found.append(f"Also scored: {', '.join(others)} (--split).")
    if len(cells) > MOST_CURVES:
        found.append("Curves of single cells are those of unfinished ones.")
    machines = {str(cell.manifest.get("machine")) for cell in cells if cell.manifest}
    if len(machines) > 1:
        found.append(f"The cells were trained on {len(machines)} kinds of machine: their times do not compare.")
    return " ".join(found)


def document(
    title: str, paragraphs: Sequence[str], cells: Sequence[RunCell], sections: Sequence[PageSection]
) -> tuple[str, dict[str, bytes]]:
    """The Markdown, and SVG by the path under which it is named there."""
    figures: dict[str, bytes] = {}
    parts = [f"# {escape(title)}\n", *map(paragraph, paragraphs)]

    def add(figure: Figure, prefix: str = "") -> None:
        path = f"figures/{prefix}{figure.name}.svg"
        figures[path] = figure.svg
        parts.append(f"![{escape(figure.caption or figure.name)}](<{path}>)\n")

    open_cells = status_tables.unfinished(cells)
    if open_cells:
        parts.append(markdown(status_tables.unfinished_table(cells), 2))
    for cell in open_cells:
        if cell.log_tail:
            quoted = "\n".join(f"    {line}" for line in cell.log_tail.splitlines())
            parts.append(f"#### Last log lines of {escape(cell.id)}\n\n{quoted}\n")
    for number, section in enumerate(sections, start=1):
        first, *others = section.tables
        heading, body = markdown(first, 2).split("\n", 1)
        parts += [f"{heading}\n", *(f"> {paragraph(text)}" for text in section.warnings)]
        parts += [*map(paragraph, section.notes), body.lstrip(), *map(markdown, others)]
        for figure in section.figures:
            add(figure, f"{number}-" if len(sections) > 1 else "")
        parts += [markdown(table, 4) for table in section.folded]
    drawn = cells if len(cells) <= MOST_CURVES else open_cells
    curves = [curve_figures.cell_curves(cell) for cell in drawn]
    if any(curves):
        parts.append("## Curves of single cells\n")
    for figure in curves:
        if figure is not None:
            add(figure)
    if cells:
        parts.append(markdown(status_tables.cells_table(cells), 2))
    return "\n".join(parts), figures
