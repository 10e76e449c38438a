"""The report as one HTML file, made from its Markdown; it needs no network, no server and no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token


def render(markdown: str, figures: Mapping[str, str | bytes]) -> str:
    """The page's HTML. All text is escaped: the Markdown may hold no HTML of its own.

    Args:
        markdown: its first heading is the page's title; those of level 2 begin a section, the text below those of
            level 4 is shown on demand.
        figures: SVG by the path under which the Markdown names it.
    """
    parser = MarkdownIt("commonmark", {"html": False}, renderer_cls=_PageRenderer).enable("table")
    page: dict[str, Any] = {"figures": figures, "headings": [], "open": []}
    body = parser.render(markdown, page)
    body += "".join(f"</{tag}>" for tag in reversed(page["open"]))
    title, *sections = page["headings"]
    links = [f'<a href="#section-{number}">{name}</a>' for number, name in enumerate(sections, start=1)]
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(title=title, links=" ".join(links), body=body)


class _PageRenderer(RendererHTML):
    """Renders headings as sections, images with their captions, and tables so that they scroll by themselves."""

    def heading_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        tag = tokens[idx].tag
        closing = ""
        while env["open"] and (tag == "h2" or env["open"][-1] == "details"):
            closing += f"</{env['open'].pop()}>"
        if tag in ("h1", "h2"):
            env["headings"].append(html.escape(tokens[idx + 1].children[0].content))  # type: ignore[index]
        if tag == "h2":
            env["open"].append("section")
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

    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        # As an image each figure is a document of its own: ids in one do not meet those in another.
        source = base64.b64encode(env["figures"][str(tokens[idx].attrs["src"])]).decode()
        caption = html.escape(tokens[idx].content)
        return f'<img src="data:image/svg+xml;base64,{source}" alt="{caption}"><span>{caption}</span>'
