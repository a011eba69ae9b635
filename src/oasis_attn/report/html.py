"""Self-contained HTML pages: no scripts, no links, figures inline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from oasis_attn.files import write_text
from oasis_attn.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THEME = """
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f6f7f9; --ink: #1b1f24;
        --muted: #68717b; --rule: #d5dae0; --accent: #2f6690; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --panel: #1c2024; --ink: #e4e7ea; --muted: #98a2ac; --rule: #343a40;
          --accent: #7fb5dc; } }
"""
"""The colors of all pages, light and dark."""

_CSS = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.25rem 5rem; max-width: 54rem; background: var(--ground);
       color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { margin: 0 0 .5rem; font-size: 2rem; line-height: 1.2; letter-spacing: -.01em; }
h2 { margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--rule);
     font-size: 1.25rem; }
p { margin: .6rem 0; max-width: 44rem; }
.lead { color: var(--muted); font-size: 1.1rem; }
code { font: .9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
figure { margin: 1.25rem 0; padding: 1rem; background: var(--panel); border-radius: 10px;
         overflow-x: auto; }
figure svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figure svg text { font-family: inherit !important; }
figcaption { margin-top: .75rem; color: var(--muted); font-size: .9rem; }
.scroll { overflow-x: auto; margin: 1.25rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
        font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .5rem; }
th, td { padding: .45rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
td { white-space: nowrap; }
.word { text-align: left; }
tbody .word:first-child { font-weight: 600; }
footer { margin-top: 4rem; color: var(--muted); font-size: .85rem; }
"""

Block = str


def paragraph(text: str) -> Block:
    """A paragraph of text; text in `backticks` is set as code."""
    parts = escape(text, quote=False).split("`")
    code = [part if index % 2 == 0 else f"<code>{part}</code>" for index, part in enumerate(parts)]
    return f"<p>{''.join(code)}</p>"


def figure_block(figure: Figure, caption: str) -> Block:
    """A figure with a caption, which is also its title for screen readers."""
    from oasis_attn.report.figures import svg

    start, end = svg(figure).split(">", 1)
    titled = f'{start} role="img"><title>{escape(caption)}</title>{end}'
    return f"<figure>{titled}<figcaption>{escape(caption)}</figcaption></figure>"


def table_block(table: Table) -> Block:
    """A table; it scrolls horizontally on a narrow page."""

    def row(cells: Iterable[str], tag: str) -> str:
        written = (
            f"<{tag}{' class=word' if index < table.text_columns else ''}>{escape(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )
        return f"<tr>{''.join(written)}</tr>"

    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    body = "\n".join(row(cells, "td") for cells in table.rows)
    head = row(table.columns, "th")
    return (
        f'<div class="scroll"><table>{caption}<thead>{head}</thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def write_page(
    path: str | Path,
    *,
    title: str,
    lead: str,
    sections: Sequence[tuple[str, Sequence[Block]]],
    footer: str,
) -> Path:
    """Write the page atomically.

    Args:
        path: path of the file.
        title: heading of the page.
        lead: introduction below the heading.
        sections: (heading, blocks); blocks are results of the functions above.
        footer: the provenance of the numbers.
    """
    body = "\n".join(
        f"<section><h2>{escape(heading)}</h2>\n" + "\n".join(blocks) + "\n</section>"
        for heading, blocks in sections
    )
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{THEME}{_CSS}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>
{body}
<footer>{escape(footer)}</footer>
</body>
</html>
"""
    return write_text(path, page)
