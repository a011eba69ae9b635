"""Self-contained HTML pages: style and program inline, no links to other files.

`page.css` is the style and `page.js` the program, which lets the reader sort tables.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from oasis_attn.files import write_text
from oasis_attn.report.document import Badges, Fold, Gallery, Item, Page, Picture
from oasis_attn.report.tables import Table

THEME = """
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f6f7f9; --ink: #1b1f24;
        --muted: #5d6670; --rule: #d5dae0; --accent: #2f6690; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --panel: #1c2024; --ink: #e4e7ea; --muted: #98a2ac; --rule: #343a40;
          --accent: #7fb5dc; } }
"""
"""The colors of all pages, light and dark."""

_LONG = 32  # characters, from which on a cell of text is given space to wrap in
_SMALLEST = 0.78  # a figure is not drawn smaller than this, so that its text remains readable
_CONTENTS = 4  # number of sections from which on a page lists them


def render(item: Item) -> str:
    """One item of a page as HTML."""
    match item:
        case str():
            return paragraph(item)
        case Table():
            return table_block(item)
        case Picture():
            return picture_block(item)
        case Gallery():
            return f'<div class="gallery">{"".join(map(picture_block, item.pictures))}</div>'
        case Badges():
            shown = (f"<li>{_badge(text, tone)}</li>" for text, tone in item.items)
            return f'<ul class="badges">{"".join(shown)}</ul>'
        case Fold():
            body = "\n".join(map(render, item.items))
            summary = f"<summary>{_text(item.summary)}</summary>"
            return f'<details>{summary}\n<div class="inside">\n{body}\n</div></details>'


def paragraph(text: str) -> str:
    """A paragraph of text; text in `backticks` is set as code."""
    return f"<p>{_text(text)}</p>"


def picture_block(picture: Picture) -> str:
    """A figure with its caption.  It scrolls if its text would become too small to read."""
    from oasis_attn.report.figures import svg

    start, end = _with_own_ids(svg(picture.figure)).split(">", 1)
    width = 96 * _SMALLEST * float(picture.figure.get_size_inches()[0])
    title = escape(picture.title, quote=False)
    titled = f'{start} role="img" style="min-width: {width:.0f}px"><title>{title}</title>{end}'
    return (
        f"<figure>{_scroll(titled, picture.title)}"
        f"<figcaption>{_text(picture.caption)}</figcaption></figure>"
    )


def table_block(table: Table) -> str:
    """A table; it scrolls within the page, and its header and first column stay in sight."""
    long = [
        index < table.text_columns and any(len(row[index]) > _LONG for row in table.rows)
        for index in range(len(table.columns))
    ]

    def row(cells: Sequence[str], head: bool) -> str:
        written = []
        for index, cell in enumerate(cells):
            kinds = ["word"] * (index < table.text_columns) + ["long"] * long[index]
            kinds += ["broad"] * (len(table.columns[index]) > _LONG)
            kind = f' class="{" ".join(kinds)}"' if kinds else ""
            first = not index and table.text_columns > 0
            scope = ' scope="col"' if head else ' scope="row"' if first else ""
            tag = "th" if scope else "td"
            tone = "" if head or table.tone is None else table.tone(cell)
            text = _badge(cell, tone) if tone else _breakable(cell)
            written.append(f"<{tag}{scope}{kind}>{text}</{tag}>")
        return f"<tr>{''.join(written)}</tr>"

    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    head = f"<thead>{row(table.columns, True)}</thead>\n" if any(table.columns) else ""
    body = "\n".join(row(cells, False) for cells in table.rows)
    html = f"<table>{caption}{head}<tbody>{body}</tbody></table>"
    return _scroll(html, table.title or "Table")


def write_page(path: str | Path, page: Page, argument: str = "out") -> Path:
    """Write the page atomically; from four sections on, it has a list of them."""
    sections = page.sections
    anchors = _anchors([section.heading for section in sections])
    links = "".join(
        f'<li><a href="#{anchor}">{_text(section.heading)}</a></li>'
        for section, anchor in zip(sections, anchors, strict=True)
    )
    contents = f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n'
    body = "\n".join(
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{_text(section.heading)}</h2>\n'
        + "\n".join(map(render, section.items))
        + "\n</section>"
        for section, anchor in zip(sections, anchors, strict=True)
    )
    above = "\n".join(map(render, page.answers))
    html = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
img-src data:">
<link rel="icon" href="data:,">
<title>{escape(page.title)}</title>
<style>{THEME}{_read("page.css")}</style>
</head>
<body>
<header><h1>{escape(page.title)}</h1>
{f'<div class="answers">{above}</div>' if above else ""}
<p class="lead">{escape(page.lead)}</p></header>
{contents if len(sections) >= _CONTENTS else ""}<main>
{body}
</main>
<footer>{escape(page.footer)}</footer>
<script>{_read("page.js")}</script>
</body>
</html>
"""
    return write_text(path, html, argument)


def _with_own_ids(text: str) -> str:
    """An SVG whose ids no other figure of the page has; ids that nothing refers to are left out.

    Two figures with the same id would share the parts of the first, which a fold may hide.
    """
    used = set(re.findall(r"[\"(]#([\w.-]+)", text))
    own = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(
        r' id="([\w.-]+)"', lambda id_: f' id="{own}-{id_[1]}"' if id_[1] in used else "", text
    )
    return re.sub(r"([\"(]#)([\w.-]+)", rf"\g<1>{own}-\2", text)


def _scroll(html: str, name: str) -> str:
    """A box that scrolls; the keyboard reaches it, too."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">{html}</div>'
    )


def _badge(text: str, tone: str) -> str:
    return f'<span class="badge {tone}">{escape(text, quote=False)}</span>'


def _text(text: str) -> str:
    parts = escape(text, quote=False).replace(" %", "&nbsp;%").split("`")
    return "".join(
        part if index % 2 == 0 else f"<code>{part}</code>" for index, part in enumerate(parts)
    )


def _breakable(cell: str) -> str:
    """A cell in which names may break after `_`, `.`, `@` and `/`."""
    return re.sub(r"(?<=[A-Za-z])([_.@/])(?=\w)", r"\1<wbr>", _text(cell))


def _anchors(headings: Sequence[str]) -> list[str]:
    """An id for each heading, none twice."""
    found: list[str] = []
    for heading in headings:
        name = re.sub(r"\W+", "-", heading.lower()).strip("-") or "section"
        found.append(name if name not in found else f"{name}-{len(found)}")
    return found


def _read(name: str) -> str:
    return (files("oasis_attn.report") / name).read_text(encoding="utf-8")
