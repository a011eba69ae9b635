"""A published study: compact records keep all whole-model metrics."""

from __future__ import annotations

import gzip
from dataclasses import replace

import pytest

from oasis_attn.errors import UserError
from oasis_attn.records import Metric
from oasis_attn.study.results import Results
from oasis_attn.study.storage import TRIALS, StudyFolder
from oasis_attn.study.study_report import tables_text
from oasis_attn.study.verdict import judge
from oasis_attn.study.worker import run_alone
from study import factories


@pytest.fixture
def whole(tmp_path):
    """A study in which all trials but one are finished."""
    folder = StudyFolder.begin(tmp_path / "whole", factories.plan(corpora=["stdlib"]))
    for trial in folder.plan.trials[:-1]:
        record = factories.record(
            trial, {"outlier.max_inf_norm": 1.5 + trial.seed, "null.mass": 0.1}
        )
        local = Metric(name="outlier.inf_norm", value=float("inf"), where="layers.0")
        tables = {"null.mass": [[0.1, 0.2]], "loss": [{"step": 1, "loss": 2.0}]}
        record = replace(record, metrics=(*record.metrics, local), tables=tables)
        record.save(folder.record_path(trial))
    return folder


@pytest.fixture
def published(whole, tmp_path):
    whole.publish(tmp_path / "published")
    return StudyFolder.open(tmp_path / "published")


def test_whole_model_metrics_tables_and_verdicts_are_kept(whole, published):
    one, other = (Results(each.plan, each.records()) for each in (whole, published))
    assert tables_text(one, judge(one)) == tables_text(other, judge(other))
    for trial, record in published.records().items():
        before = one.records[trial]
        assert record.metrics == before.metrics[:-1]
        assert record.tables == {"null.mass": [[0.1, 0.2]]}
        assert replace(record, metrics=(), tables={}) == replace(before, metrics=(), tables={})
    assert published.status() == whole.status()


def test_publishing_again_changes_nothing(published, tmp_path):
    published.publish(tmp_path / "again")
    for name in ("plan.yaml", TRIALS):
        assert (tmp_path / "again" / name).read_bytes() == (published.path / name).read_bytes()


def test_another_study_reuses_the_records(published, tmp_path):
    fresh = StudyFolder.begin(tmp_path / "fresh", published.plan)
    fresh.add(fresh.reusable([published]))
    assert fresh.records() == published.records()
    assert fresh.missing() == published.missing() == [published.plan.trials[-1]]


def test_a_rerun_is_compared_with_the_record_of_the_folder_if_there_is_one(published, tmp_path):
    absent = published.plan.trials[-1].id
    with pytest.raises(UserError, match=f"check: .* contains no record of '{absent}'"):
        run_alone(str(published.path), absent, out=tmp_path / "r.json", check=published.path)


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"kind": "trial", "version": 1}', '{"kind": "trial", "version": 9}']
)
def test_a_broken_line_is_named(published, line):
    path = published.path / TRIALS
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + line.encode()))
    with pytest.raises(UserError, match=r"trials.jsonl.gz:19"):
        StudyFolder.open(published.path).records()


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"text" + data])
def test_a_damaged_file_is_one_clear_error(published, damage):
    path = published.path / TRIALS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"record: .*trials.jsonl.gz' cannot be read"):
        StudyFolder.open(published.path).records()
