from __future__ import annotations

import os

import pytest

from oasis_attn.errors import UserError
from oasis_attn.files import check_free, check_writable, staged_folder
from oasis_attn.records import Metric, Record


def test_a_place_is_free_or_not(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for free in ("new", "empty", "a/b/c"):
        check_free(tmp_path / free)
    monkeypatch.chdir(tmp_path / "empty")
    for path, reason in (
        (tmp_path, "exists"),
        (tmp_path / "file", "exists"),
        (tmp_path / "file" / "new", "is a file"),
        (".", "is the current folder"),
    ):
        with pytest.raises(UserError, match=f"out: .*{reason}"), staged_folder(path):
            raise AssertionError


def test_a_file_can_be_written_or_not(tmp_path):
    (tmp_path / "file").write_text("x")
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "a" / "b.json")
    with pytest.raises(UserError, match=r"record: .* is a folder"):
        check_writable(tmp_path, "record")
    with pytest.raises(UserError, match=r"cannot be written, .*file' is a file"):
        check_writable(tmp_path / "file" / "a" / "b.json")
    if os.geteuid():  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(UserError, match="is protected"):
            check_writable(tmp_path / "b.json")
        tmp_path.chmod(0o700)


def test_what_is_not_finite_is_read_back_as_it_was(tmp_path):
    nan = float("nan")
    metrics = (Metric(name="a", value=nan, standard_error=nan), Metric(name="b", value=-1e400))
    record = Record(kind="evaluation", subject={}, metrics=metrics)
    again = Record.load(record.save(tmp_path / "record.json"))
    assert repr(again.metrics) == repr(metrics)
