from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from matplotlib.figure import Figure

from oasis_attn.report import Table
from oasis_attn.report.html import figure_block, paragraph, table_block, write_page

VOID = {"meta", "path", "use", "rect", "image", "line"}


class Balance(HTMLParser):
    """Collects tags that are not closed or closed in the wrong order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_paragraphs_are_escaped_and_backticks_are_code() -> None:
    assert paragraph("a < b & `x<y>`") == "<p>a &lt; b &amp; <code>x&lt;y&gt;</code></p>"


def test_table_marks_text_columns_and_escapes() -> None:
    text = table_block(Table(title="T", columns=("model", "loss"), rows=(("<m>", "2"),)))
    assert "<td class=word>&lt;m&gt;</td><td>2</td>" in text
    assert "<caption>T</caption>" in text


def test_page_is_self_contained_and_well_formed(tmp_path: Path) -> None:
    figure = Figure()
    figure.subplots().plot([1, 2])
    path = write_page(
        tmp_path / "index.html",
        title="Title & more",
        lead="Lead.",
        sections=[("Part", [paragraph("Text."), figure_block(figure, "How to read it.")])],
        footer="From records.",
    )
    page = path.read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert balance.wrong == []
    assert "<title>Title &amp; more</title>" in page
    assert not re.search(r"(?:src|href)=[\"']?http|<script|<link|@import|url\(http", page)
