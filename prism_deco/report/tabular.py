"""Tables as plain text in cells, and their forms: Markdown, the terminal, CSV."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

MISSING = "-"


@dataclass(frozen=True)
class Field:
    """What stands in a cell of a table.

    Attributes:
        lines: smaller print below it.
        best: to be made prominent.
        muted: not a value but a word about its absence.
    """

    text: str
    lines: tuple[str, ...] = ()
    best: bool = False
    muted: bool = False


@dataclass(frozen=True)
class Table:
    """A table to print.

    Attributes:
        heads: how many columns, from the left, hold names rather than numbers.
        starts: rows above which a line separates groups.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Field]]
    heads: int = 1
    caption: str = ""
    starts: frozenset[int] = field(default_factory=frozenset)


def number(value: float | None, digits: int = 1, sign: str = "") -> str:
    """A number as all tables print it; a dash for None."""
    return MISSING if value is None else f"{value:{sign}.{digits}f}"


def interval(bounds: tuple[float, float] | None, digits: int = 1, sign: str = "") -> str:
    """`low to high`; a dash for None."""
    return MISSING if bounds is None else " to ".join(f"{bound:{sign}.{digits}f}" for bound in bounds)


def markdown(table: Table, level: int = 3) -> str:
    """A Markdown table below its title, a heading of that level; all text in it is escaped."""
    heads = [":--" if number < table.heads else "--:" for number in range(len(table.columns))]
    lines = ["| " + " | ".join(map(escape, table.columns)) + " |", "|" + "|".join(heads) + "|"]
    lines += ["| " + " | ".join(map(_markdown, row)) + " |" for row in table.rows]
    caption = ["", escape(table.caption)] if table.caption else []
    return "\n".join([f"{'#' * level} {escape(table.title)}", "", *lines, *caption, ""])


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{sign}" if sign in "\\`*[]|" else sign for sign in plain)


def _markdown(entry: Field) -> str:
    text = escape(entry.text)
    text = f"**{text}**" if entry.best else text
    small = "; ".join(line.removesuffix(".") for line in entry.lines)
    return f"{text} ({escape(small)})" if small else text


def terminal(table: Table) -> RichTable:
    """A table for the terminal, without the small print."""
    made = RichTable(title=Text(table.title))
    for position, column in enumerate(table.columns):
        side = "left" if position < table.heads else "right"
        made.add_column(Text(column), justify=side, overflow="fold", no_wrap=0 < position < table.heads, min_width=4)
    for position, row in enumerate(table.rows):
        if position and position in table.starts:
            made.add_section()
        made.add_row(*(Text(entry.text, style="bold" if entry.best else "") for entry in row))
    return made


def comma_separated(records: Sequence[Mapping[str, Any]]) -> str:
    """CSV with a header; empty where a value is None. Cells that a spreadsheet would run as formulas are quoted."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _plain(value) for key, value in record.items()} for record in records)
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value
