"""One HTML file with all tables and figures; it needs no network, no server and no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from prism_deco.report.plotting import Figure
from prism_deco.report.tabular import Field, Table


@dataclass(frozen=True)
class Section:
    """A part of the report, under the title of its first table.

    Attributes:
        tables: shown at once; at least one.
        warnings: what the cells do not have in common.
        departures: settings of cells that differ from their recipe's or the paper's.
        folded: long tables, shown on demand.
    """

    tables: Sequence[Table]
    figures: Sequence[Figure] = ()
    warnings: Sequence[str] = ()
    departures: Sequence[str] = ()
    folded: Sequence[Table] = ()

    @property
    def title(self) -> str:
        return self.tables[0].title


@dataclass(frozen=True)
class Report:
    """What the Markdown and the page show.

    Attributes:
        progress: how many cells are finished.
        notes: about the whole report.
        unfinished: the table of unfinished cells; None where all are done.
        logs: last log lines of unfinished cells, by cell.
        curves: of single cells.
        cells: what every cell was trained on; None where there is none.
    """

    title: str
    progress: str
    notes: Sequence[str] = ()
    unfinished: Table | None = None
    logs: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = ()
    curves: Sequence[Figure] = ()
    cells: Table | None = None
    files: Sequence[str] = field(default_factory=tuple)


def render(report: Report) -> str:
    """The page's HTML; every text in it is escaped."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": _data_uri, "merged": _merged}
    return environment.get_template("html_page.html").render(report=report)


def _merged(table: Table) -> list[list[tuple[Field, bool, int]]]:
    """Rows of (field, whether it is a name, rows that it spans): a name spans the empty fields below it."""
    rows = []
    for number, row in enumerate(table.rows):
        fields = []
        for column, entry in enumerate(row):
            head = column < table.heads
            if head and not entry.text and number and number not in table.starts:
                continue
            below = (k for k in range(number + 1, len(table.rows)) if k in table.starts or table.rows[k][column].text)
            end = next(below, len(table.rows)) if head and entry.text else number + 1
            fields.append((entry, head, end - number))
        rows.append(fields)
    return rows


def _data_uri(figure: Figure) -> str:
    # As an image each figure is a document of its own: ids in one do not meet those in another.
    return f"data:image/svg+xml;base64,{base64.b64encode(figure.svg).decode()}"
