"""Tables of text, as Markdown, on the terminal, and as CSV."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.table import Table as RichTable
from rich.text import Text

MISSING = "-"


@dataclass(frozen=True)
class Field:
    """One field of a table.

    Attributes:
        lines: smaller print below the text.
        best: print the text in bold.
    """

    text: str
    lines: tuple[str, ...] = ()
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table to print. The first column holds row names, and stays visible in tables wider than the screen.

    Attributes:
        rows: one field per column; a row of a single field is the heading of the rows below it.
        words: left-align the columns, which hold words instead of numbers.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Field]]
    caption: str = ""
    words: bool = False


def records_table(title: str, records: Sequence[Mapping[str, Any]], caption: str = "") -> Table:
    """A table of CSV records."""
    rows = [[Field(_shown(value)) for value in record.values()] for record in records]
    return Table(title, [key.replace("_", " ") for key in records[0]], rows, caption, words=True)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else MISSING
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if value else MISSING


def under_headings(rows: Iterable[tuple[Field, Sequence[Field]]]) -> list[Sequence[Field]]:
    """The rows, with the heading inserted wherever it changes."""
    found: list[Sequence[Field]] = []
    previous = None
    for heading, fields in rows:
        if heading.text != previous:
            found.append([heading])
        found.append(fields)
        previous = heading.text
    return found


def format_number(value: float | None, digits: int = 1, sign: str = "") -> str:
    """A number with a fixed number of decimals; a dash for None."""
    return MISSING if value is None else f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # no "-0.0"


def format_interval(bounds: tuple[float, float] | None, sign: str = "") -> str:
    """`low to high`; a dash for None."""
    return MISSING if bounds is None else " to ".join(format_number(bound, sign=sign) for bound in bounds)


def paragraph(text: str) -> str:
    """A Markdown paragraph, escaped so that it cannot start a heading, a list or a quotation."""
    return re.sub(r"^(\d*)([#>+~=.)-])", r"\1\\\2", escape(text)) + "\n"


def markdown(table: Table) -> str:
    """A Markdown table and its caption, all text escaped."""
    width = len(table.columns)
    sides = [":--"] + [":--" if table.words else "--:"] * (width - 1)
    lines = ["| " + " | ".join(map(escape, table.columns)) + " |", "|" + "|".join(sides) + "|"]
    for row in table.rows:
        # A row of one field is a heading: printed in bold, and filled up with empty fields.
        fields = [_markdown(field) for field in row] if len(row) > 1 else [_markdown(row[0], bold=True)]
        lines.append("| " + " | ".join(fields + [""] * (width - len(row))) + " |")
    return "\n".join([*lines, "", *([paragraph(table.caption)] if table.caption else [])])


def _markdown(field: Field, bold: bool = False) -> str:
    text = escape(field.text)
    parts = [f"**{text}**" if (field.best or bold) and text else text]
    return " ".join([*parts, *(f"*{escape(line)}*" for line in field.lines)])


def escape(text: str) -> str:
    """Text on one line, escaped for Markdown."""
    plain = html.escape(" ".join(text.split()), quote=False)
    escaped = "".join(f"\\{sign}" if sign in "\\`*[]|" else sign for sign in plain)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", escaped)  # underscores inside words are literal


class TerminalTable:
    """A table for the terminal, without the smaller print.

    A table wider than the terminal is printed as several blocks of columns, each starting with the first column. No
    column is dropped, and only row names wrap.
    """

    def __init__(self, table: Table):
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RichTable]:
        widths = [max(map(len, texts)) for texts in self._columns()]
        rest = max(widths[1:], default=0)
        words = [word for text in self._columns()[0] for word in text.split()]
        # Row names get the width that the widest other column leaves, but never less than their longest word. rich adds
        # 3 columns per cell for padding and border, and 1 for the last border.
        widths[0] = min(widths[0], max([options.max_width - rest - 7, *map(len, words)]), options.max_width - 4)
        # Columns that do not fit any more begin another table below, again with the row names.
        blocks: list[list[int]] = [[]]
        for number in range(1, len(widths)):
            # The width of the current block with this column added: every block repeats the first column.
            used = sum(widths[own] + 3 for own in (0, *blocks[-1], number)) + 1
            if blocks[-1] and used > options.max_width:
                blocks.append([])
            blocks[-1].append(number)
        for k, block in enumerate(blocks):
            yield self._block(f"{self._table.title}{', continued' if k else ''}", block, widths)

    def _columns(self) -> list[list[str]]:
        """The texts of each column and its name; the first column includes the row headings."""
        columns = [[name] for name in self._table.columns]
        for row in self._table.rows:
            # Not strict: the only field of a heading belongs to the first column.
            for texts, field in zip(columns, row, strict=False):
                texts.append(field.text)
        return columns

    def _block(self, title: str, numbers: Sequence[int], widths: Sequence[int]) -> RichTable:
        made = RichTable(title=Text(title), title_justify="left")
        made.add_column(Text(self._table.columns[0]), overflow="fold", width=widths[0])
        for number in numbers:
            justify = "left" if self._table.words else "right"
            made.add_column(Text(self._table.columns[number]), justify=justify, overflow="fold", width=widths[number])
        for row in self._table.rows:
            if len(row) == 1:
                made.add_section()
            fields = [row[0], *(row[number] for number in numbers)] if len(row) > 1 else row
            made.add_row(*(Text(field.text, "bold" if field.best or len(row) == 1 else "") for field in fields))
        return made


def comma_separated(records: Sequence[Mapping[str, Any]]) -> str:
    """CSV with a header; None becomes an empty field. Text that a spreadsheet would run as a formula gets a `'`."""
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
