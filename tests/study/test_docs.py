"""Results in the docs are the records': tables are made again from them and compared."""

from __future__ import annotations

from pathlib import Path

import pytest

import publish
from oasis_attn.study.folder import StudyFolder
from oasis_attn.study.page import tables_text
from oasis_attn.study.results import Results
from oasis_attn.study.verdict import judge

FOLDERS = sorted(path.parent for path in Path(__file__).parents[2].glob("docs/results/*/plan.yaml"))


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.name)
def test_committed_tables_are_those_of_the_committed_records(path: Path) -> None:
    folder = StudyFolder.open(path)
    results = Results(folder.plan, folder.records())
    expected = tables_text(results, judge(results))
    assert (path / "tables.md").read_text(encoding="utf-8") == expected


def test_the_page_holds_what_is_on_record() -> None:
    text = publish.PAGE.read_text(encoding="utf-8")
    assert publish.verdicts() in text
    assert publish.start() in text
    assert publish.twins() in text
    assert publish.silent() in text
    assert publish.bar() in text
    assert publish.scaling() in text
    assert publish.page(text) == text
