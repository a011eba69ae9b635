"""Files of the figures and tables of a report: PNG and SVG, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from oasis_attn.files import write_text
from oasis_attn.report.document import Picture, Section, walk
from oasis_attn.report.tables import Table

_Named = TypeVar("_Named", Picture, Table)
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "·": r"$\cdot$",
    "\n": " ",
}  # fmt: skip
_WRAPPED = 40  # characters, from which on a column of text has a fixed width
_GROUPED = re.compile(r"(?<=\d),(?=\d{3}\b)")


def save_figures(sections: Iterable[Section], folder: str | Path) -> list[Path]:
    """Write every figure to `folder` as a PNG and an SVG file; returns the paths."""
    from oasis_attn.report import figures

    pictures = [item for item in walk(sections) if isinstance(item, Picture)]
    named = _named([each.name for each in pictures], pictures)
    return figures.save_figures({name: picture.figure for name, picture in named}, folder)


def save_tables(sections: Iterable[Section], folder: str | Path) -> list[Path]:
    """Write every table to `folder` as a CSV and a LaTeX file; returns the paths."""
    tables = [item for item in walk(sections) if isinstance(item, Table)]
    written = []
    for name, table in _named([each.title or "table" for each in tables], tables):
        for ending, form in (("csv", csv_text), ("tex", latex_text)):
            written.append(write_text(Path(folder) / f"{name}.{ending}", form(table), "tables"))
    return written


def csv_text(table: Table) -> str:
    """The table as CSV (RFC 4180, lines end with a line feed), without separators of thousands."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    if any(table.columns):
        writer.writerow(table.columns)
    for row in table.rows:
        text, numbers = row[: table.text_columns], row[table.text_columns :]
        writer.writerow([*text, *(_GROUPED.sub("", cell) for cell in numbers)])
    return stream.getvalue()


def latex_text(table: Table) -> str:
    """The table as a LaTeX `tabular`, for the package booktabs."""

    def kind(index: int) -> str:
        if index >= table.text_columns:
            return "r"
        longest = max((len(row[index]) for row in table.rows), default=0)
        return r"p{0.4\linewidth}" if longest > _WRAPPED else "l"

    def line(cells: Iterable[str]) -> str:
        return " & ".join(map(_latex, cells)) + r" \\"

    kinds = "".join(map(kind, range(len(table.columns))))
    head = [line(table.columns), r"\midrule"] if any(table.columns) else []
    lines = [
        *([f"% {table.title}".replace("\n", " ")] if table.title else []),
        f"\\begin{{tabular}}{{{kinds}}}",
        r"\toprule",
        *head,
        *map(line, table.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _latex(cell: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in cell)


def _named(names: Iterable[str], items: Iterable[_Named]) -> list[tuple[str, _Named]]:
    """Each item with a file name that no other has."""
    taken: set[str] = set()
    found = []
    for text, item in zip(names, items, strict=True):
        base = re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-.")[:80] or "table"
        name, number = base, 2
        while name in taken:
            name, number = f"{base}-{number}", number + 1
        taken.add(name)
        found.append((name, item))
    return found
