from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from matplotlib.figure import Figure

from oasis_attn.report import Table
from oasis_attn.report.document import Badges, Fold, Gallery, Page, Picture, Section, walk
from oasis_attn.report.html import paragraph, render, table_block, write_page

VOID = {"meta", "path", "use", "rect", "image", "line", "link", "wbr"}


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


def picture(name: str = "line") -> Picture:
    figure = Figure(figsize=(4.2, 2))
    figure.subplots().plot([1, 2])
    return Picture(name=name, title="A line", caption="How to read `it`.", figure=figure)


def test_paragraphs_are_escaped_and_backticks_are_code() -> None:
    assert paragraph("a < b & `x<y>`") == "<p>a &lt; b &amp; <code>x&lt;y&gt;</code></p>"


def test_table_marks_text_columns_and_escapes() -> None:
    text = table_block(Table(title="T", columns=("model", "loss"), rows=(("<m>", "2"),)))
    assert '<th scope="row" class="word">&lt;m&gt;</th><td>2</td>' in text
    assert '<th scope="col" class="word">model</th><th scope="col">loss</th>' in text
    assert "<caption>T</caption>" in text


def test_a_table_without_a_header_has_none() -> None:
    text = table_block(Table(columns=("", ""), rows=(("a", "b"),), text_columns=2))
    assert "thead" not in text


def test_names_can_break_and_long_text_has_space() -> None:
    rows = (("a_b.c@d", "word " * 9),)
    text = table_block(Table(columns=("name", "text"), rows=rows, text_columns=2))
    assert "a_<wbr>b.<wbr>c@<wbr>d" in text
    assert '<td class="word long">' in text


def test_cells_with_a_tone_are_badges() -> None:
    table = Table(
        columns=("claim", "verdict"),
        rows=(("met", "met"), ("b", "other")),
        tone=lambda cell: "good" if cell == "met" else "",
    )
    text = table_block(table)
    assert text.count('<span class="badge good">met</span>') == 2
    assert "<td>other</td>" in text
    assert '<li><span class="badge bad">x</span></li>' in render(Badges((("x", "bad"),)))


def test_everything_in_folds_and_galleries_is_found() -> None:
    inner = picture("inner")
    sections = [Section("A", ["text", Fold("more", (Gallery((inner,)), "end"))])]
    assert inner in list(walk(sections))


def test_page_is_self_contained_and_well_formed(tmp_path: Path) -> None:
    page = Page(
        title="Title & more",
        lead="Lead.",
        answers=["The answer.", Badges((("2 supported", "good"),))],
        sections=[
            Section("Part", ["Text.", picture()]),
            Section("Part", [Fold("More <b>", (Gallery((picture(),)),))]),
            Section("Table", [Table(columns=("a_b",), rows=(("1",),))]),
            Section("?", []),
        ],
        footer="From records.",
    )
    html = write_page(tmp_path / "index.html", page).read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(html)
    assert balance.open == []
    assert balance.wrong == []
    assert "<title>Title &amp; more</title>" in html
    assert not re.search(r"(?:src|href)=[\"']?http|@import|url\(http|\bimport\b|fetch\(", html)
    assert html.index("The answer.") < html.index("Lead.")
    links = re.findall(r'<a href="#([^"]*)"', html)
    assert links == ["part", "part-1", "table", "section"]
    assert all(f'<h2 id="{link}">' in html for link in links)
    assert html.count("<title>A line</title>") == 2


def test_a_short_page_has_no_contents(tmp_path: Path) -> None:
    sections = [Section("Part", ["Text."])]
    page = Page(title="T", lead="", sections=sections, footer="")
    assert "<nav" not in write_page(tmp_path / "p.html", page).read_text()
