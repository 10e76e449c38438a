"""The report as Markdown with figures, and as one self-contained HTML file without scripts."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

from prism_deco.report.plotting import Figure
from prism_deco.report.tabular import Table, escape, markdown, paragraph


@dataclass(frozen=True)
class PageSection:
    """A section of the report, titled after its first table.

    Attributes:
        warnings: paragraphs above the tables, as block quotes.
        folded: long tables in collapsed sections.
        logs: last log lines by cell.
    """

    tables: Sequence[Table]
    figures: Sequence[Figure] = ()
    warnings: Sequence[str] = ()
    folded: Sequence[Table] = ()
    logs: Mapping[str, str] = field(default_factory=dict)


def document(
    title: str, paragraphs: Sequence[str], sections: Sequence[PageSection]
) -> tuple[str, dict[str, str | bytes]]:
    """The Markdown, and the SVG figures by the paths that it refers to."""
    figures: dict[str, str | bytes] = {}
    parts = [f"# {escape(title)}\n", *map(paragraph, paragraphs)]
    for number, section in enumerate(sections, start=1):
        parts.append(f"## {escape(section.tables[0].title)}\n")
        parts += [f"> {paragraph(text)}" for text in section.warnings]
        for table in section.tables:
            parts += [f"### {escape(table.title)}\n"] if table is not section.tables[0] else []
            parts.append(markdown(table))
        for figure in section.figures:
            path = f"figures/{figure.name}.svg"
            if path in figures:
                # Sections of several parts may draw figures of the same name: the later ones get their section's
                # number.
                path = f"figures/{number}-{figure.name}.svg"
            figures[path] = figure.svg
            parts.append(f"![{escape(figure.caption or figure.name)}](<{path}>)\n")
        for table in section.folded:
            parts += [f"#### {escape(table.title)}\n", markdown(table)]
        for name, text in section.logs.items():
            # Indented by four spaces: a code block, in which no character is markup.
            quoted = "\n".join(f"    {line}" for line in text.splitlines())
            parts.append(f"#### Last log lines of {escape(name)}\n\n{quoted}\n")
    return "\n".join(parts), figures


def render(text: str, figures: Mapping[str, str | bytes]) -> str:
    """The page's HTML. HTML in the Markdown is escaped.

    Args:
        text: Markdown. Its first heading is the page's title, headings of level 2 start a section, and those of level 4
            a collapsed `<details>`.
        figures: SVG by the paths that the Markdown refers to.
    """
    parser = MarkdownIt("commonmark", {"html": False}, renderer_cls=_PageRenderer).enable("table")
    # markdown-it passes this to each method below as `env`. headings: the title, then the sections'; open: tags still
    # to be closed, outermost first.
    page: dict[str, Any] = {"figures": figures, "headings": [], "open": []}
    body = parser.render(text, page)
    body += "".join(f"</{tag}>" for tag in reversed(page["open"]))
    title, *sections = page["headings"]
    links = [f'<a href="#section-{number}">{name}</a>' for number, name in enumerate(sections, start=1)]
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(title=title, links=" ".join(links), body=body)


class _PageRenderer(RendererHTML):
    """Renders headings as sections, images inline with captions, and tables in scrollable boxes."""

    def heading_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        tag = tokens[idx].tag
        closing = ""
        # A heading of level 2 closes all that is open, any other one only an open `<details>`: these never nest.
        while env["open"] and (tag == "h2" or env["open"][-1] == "details"):
            closing += f"</{env['open'].pop()}>"
        if tag in ("h1", "h2"):
            # The text of a heading is in the inline token that follows it.
            children = tokens[idx + 1].children or []
            env["headings"].append(html.escape("".join(child.content for child in children)))
        if tag == "h2":
            env["open"].append("section")
            # The title is the first of the headings, so sections count from 1, as in the links of `render`.
            return f'{closing}<section id="section-{len(env["headings"]) - 1}"><h2>'
        if tag == "h4":
            env["open"].append("details")
            return f"{closing}<details><summary>"
        return f"{closing}<{tag}>"

    def heading_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return "</summary>" if tokens[idx].tag == "h4" else f"</{tokens[idx].tag}>\n"

    def table_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>\n'

    def table_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return "</table></div>\n"

    def text(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        # No-break spaces keep an interval on one line.
        return re.sub(r"(?<=\d) to (?=[+-]?\d)", "\u00a0to\u00a0", super().text(tokens, idx, options, env))

    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        # `<img>`, not inline `<svg>`: the ids of two inline figures would collide.
        source = base64.b64encode(env["figures"][str(tokens[idx].attrs["src"])]).decode()
        caption = html.escape(tokens[idx].content)
        return f'<img src="data:image/svg+xml;base64,{source}" alt="{caption}"><span>{caption}</span>'
