from __future__ import annotations

import re

import pytest

from full_disk import files_of_at_most
from oasis_attn.errors import UserError
from oasis_attn.study.reading_guide import notes, progress_text
from oasis_attn.study.storage import StudyFolder
from oasis_attn.study.study_report import write_report
from oasis_attn.study.tables import results_tables
from oasis_attn.study.verdict import judge
from study import factories


def value(trial) -> float:
    return (5.0 if trial.variant == "oasis" else 10.0) + trial.seed / 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    plan = factories.plan()
    names = ("outlier.max_inf_norm", "sink.mass")
    results = factories.results(plan, value, names)
    return factories.saved(tmp_path_factory.mktemp("page") / "out", results)


def test_report_is_one_self_contained_page_with_tables_and_figures(folder, tmp_path):
    written = write_report(folder, tmp_path / "index.html")
    assert {path.name for path in written} == {
        "index.html", "tables.md", "changes-oasis.png", "key-outlier.max_inf_norm.png",
        "key-sink.mass.png",
    }  # fmt: skip
    page = (tmp_path / "index.html").read_text(encoding="utf-8").replace("<wbr>", "")
    assert not re.search(r"(?:src|href)=[\"']?http|@import|url\(http", page)
    results = factories.Results(folder.plan, folder.records())
    for table in results_tables(results, judge(results)):
        for row in table.rows:
            if "not tested" in row:
                assert row[1] not in page
                continue
            assert all(text in page for text in row if not re.search(r"[&<>']", text))


def test_the_same_records_give_the_same_files(folder, tmp_path):
    for name in ("a", "b"):
        write_report(folder, tmp_path / name / "index.html")
    for name in ("index.html", "tables.md"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()


def test_markdown_has_every_table_and_says_how_to_read_it(folder, tmp_path):
    write_report(folder, tmp_path / "index.html")
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert text.count("\n### ") == 5
    assert "| max inf-norm | attn_residual | 6 |" in text
    assert "Holm" in text


@pytest.mark.parametrize("size", [100, 10_000])
def test_a_full_disk_is_an_error_about_the_page(folder, tmp_path, size):
    with (
        files_of_at_most(size),
        pytest.raises(UserError, match=r"^page: '.*' cannot be written: File too large"),
    ):
        write_report(folder, tmp_path / "index.html")


def test_a_study_without_claims_has_a_page_without_verdicts(tmp_path):
    plan = factories.plan(claims=[])
    folder = StudyFolder.begin(tmp_path / "out", plan)
    trial, record = next(iter(factories.results(plan, value).records.items()))
    record.save(folder.record_path(trial))
    write_report(folder, tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "1 of 38 trials" in page
    assert "Verdicts" not in page
    assert "A test is passed" not in (tmp_path / "tables.md").read_text(encoding="utf-8")


def test_notes_name_residual_forms_that_cannot_be_compared():
    both = factories.results(factories.plan(), value)
    forms = "sum: vanilla, clipped_softmax, gated_attention, softmax1; depth: attn_residual, oasis."
    assert forms in notes(both)[0]
    alone = {c: r for c, r in both.records.items() if c.variant in ("vanilla", "softmax1")}
    assert notes(factories.Results(both.plan, alone)) == []
    sigmoid = factories.plan(variants=["oasis", "oasis_depth_sigmoid"], compare={}, noise_seeds=[])
    assert ["Sigmoid" in note for note in notes(factories.results(sigmoid, value))] == [True]


def test_missing_trials_are_counted():
    both = factories.results(factories.plan(), value)
    part = dict(list(both.records.items())[:5])
    text = progress_text(factories.Results(both.plan, part))
    assert text == (
        "5 of 38 trials: 6 variants x 2 corpora x 1 size x 3 seeds, and 1 additional seed of"
        " vanilla."
    )
