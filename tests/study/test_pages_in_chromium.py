"""Pages of studies and records in a browser: one start, a few seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from chromium import EXECUTABLE, chromium
from oasis_attn.records import Metric
from oasis_attn.study.combined_report import write_combined_report
from study import factories
from study.test_study_page import CRITERIA, NAMES, value
from test_records import EXAMPLES

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="needs Chromium")
OPEN = 'document.querySelectorAll("details").forEach((fold) => { fold.open = true; })'
DRAWN = "new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))"
CLIPPED = """[...document.querySelectorAll("svg")].flatMap((svg) => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter((text) => {
    const b = text.getBoundingClientRect();
    return b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1
      || b.bottom > box.bottom + 1;
  }).map((text) => text.textContent);
})"""
SMALLEST = """Math.min(...[...document.querySelectorAll("svg text")].map((text) =>
  parseFloat(getComputedStyle(text).fontSize)
    * Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b)))"""
COLUMN = "[...document.querySelectorAll('{} tbody tr')].map((row) => row.cells[{}].textContent)"


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A study with claims, criteria and candidates, and records of all kinds."""
    folder = tmp_path_factory.mktemp("pages")
    plan = factories.plan(
        criteria=CRITERIA, candidates=["oasis", "softmax1"], claims=["paper/largest_activation"]
    )
    results = factories.results(plan, value, (*NAMES, "outlier.max_inf_norm"))
    study = factories.saved(folder / "study", results)
    paths = []
    for record in EXAMPLES:
        metrics = (*record.metrics, Metric(name="perplexity.windowed", value=9.0))
        tables = record.tables | {"sink.mass": [[0.1, 0.9]]}
        paths.append(folder / f"{record.kind}.json")
        replace(record, metrics=metrics, tables=tables).save(paths[-1])
    write_combined_report([study.path], folder / "study.html")
    write_combined_report(paths, folder / "records.html")
    return {name: folder / f"{name}.html" for name in ("study", "records")}


@pytest.fixture(scope="module")
def browser():
    with chromium() as page:
        yield page
        assert page.errors == []
        assert all(url.startswith(("file:", "data:")) for url in page.requests)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["study", "records"])
def test_text_has_contrast_and_nothing_overflows_a_phone(browser, pages, name, dark):
    browser.open(pages[name], width=375, height=700, dark=dark)
    browser.run(OPEN)
    browser.run(DRAWN)
    assert browser.run("document.documentElement.scrollWidth") == 375
    count, failed = browser.contrast()
    assert count > 60
    assert failed == []
    assert browser.run(SMALLEST) > 8.5


@pytest.mark.parametrize("name", ["study", "records"])
def test_every_picture_has_a_title_and_no_text_of_it_is_clipped(browser, pages, name):
    browser.open(pages[name], width=1200)
    browser.run(OPEN)
    browser.run(DRAWN)
    assert browser.run(
        "[...document.querySelectorAll('svg')].every((e) => e.querySelector('title'))"
    )
    assert browser.run("document.querySelectorAll('svg').length") > 2
    assert browser.unnamed() == []
    assert browser.run(CLIPPED) == []
    ids = browser.run("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))


def test_tables_are_sorted_by_mouse_and_keyboard(browser, pages):
    browser.open(pages["study"], width=1200)
    browser.run(OPEN)
    browser.run("[...document.querySelectorAll('table')].at(-1).id = 'means'")
    before = browser.run(COLUMN.format("#means", 0))
    assert before[-1].replace("\u200b", "") == "oasis"
    browser.click("#means th:nth-child(3) button")
    assert browser.run(COLUMN.format("#means", 0))[0] == "oasis"
    header = "document.querySelector('#means th:nth-child(3)')"
    assert browser.run(f"{header}.getAttribute('aria-sort')") == "ascending"
    browser.run(f"{header}.querySelector('button').focus()")
    browser.press("Enter")
    assert browser.run(f"{header}.getAttribute('aria-sort')") == "descending"
    assert browser.run(COLUMN.format("#means", 0))[-1] == "oasis"
    browser.click("#means th:nth-child(1) button")
    names = browser.run(COLUMN.format("#means", 0))
    assert names == sorted(names)
    assert browser.run(f"{header}.hasAttribute('aria-sort')") is False


def test_cells_are_sorted_by_their_numbers(browser, pages):
    browser.open(pages["study"])
    numbers = {
        "1,234 ± 5": 1234, "+2.50%": 2.5, "-3.1e-05": -3.1e-05, "+1.2e+03 x": 1.2e5,
        "< 0.0001": 0.0001, "10 of 11": 10, "-": None, "vanilla": None,
    }  # fmt: skip
    for text, number in numbers.items():
        assert browser.run(f"numberIn({text!r})") == number


def test_folds_and_wide_tables_work_with_the_keyboard(browser, pages):
    browser.open(pages["study"], width=375, height=700)
    summary = "document.querySelector('details > summary')"
    browser.run(f"{summary}.focus()")
    browser.press("Enter")
    assert browser.run(f"{summary}.parentElement.open") is True
    browser.run(DRAWN)
    wide = (
        "[...document.querySelectorAll('.scroll')].find((e) => e.scrollWidth > e.clientWidth + 50)"
    )
    assert browser.run(f"{wide}.tabIndex") == 0
    browser.run(f"{wide}.scrollLeft = 80")
    first = f"{wide}.querySelector('tbody tr > :first-child')"
    left = f"{first}.getBoundingClientRect().left - {wide}.getBoundingClientRect().left"
    assert browser.run(left) == pytest.approx(0, abs=1)


def test_contents_lead_to_every_section(browser, pages):
    browser.open(pages["study"])
    links = browser.run("[...document.querySelectorAll('nav a')].map((a) => a.hash.slice(1))")
    assert links == browser.run("[...document.querySelectorAll('h2')].map((h) => h.id)")
    browser.click("nav li:last-child a")
    assert browser.run("location.hash") == f"#{links[-1]}"
