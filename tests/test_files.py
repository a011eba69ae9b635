from __future__ import annotations

import errno
import multiprocessing
import os
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from full_disk import files_of_at_most
from oasis_attn.errors import UserError
from oasis_attn.files import (
    check_free,
    check_writable,
    is_locked,
    lock,
    staged_folder,
    write_text,
    writing,
)

SECONDS = 60.0  # after which a process that should have answered counts as stuck


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
    with pytest.raises(UserError, match=r"cannot be written: .*file' is a file"):
        check_writable(tmp_path / "file" / "a" / "b.json")
    os.mkfifo(tmp_path / "pipe")
    for special in ("/dev/null", tmp_path / "pipe"):
        with pytest.raises(UserError, match="is not a regular file"):
            check_writable(special)
    for check in (check_writable, check_free):
        with pytest.raises(UserError, match=r"out: '/proc/x/y' cannot be written: .* in '/proc'"):
            check("/proc/x/y")
        with pytest.raises(UserError, match="File name too long") as caught:
            check(tmp_path / ("a" * 5000))
        assert len(str(caught.value)) < 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
    if os.geteuid():  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(UserError, match="cannot be written: Permission denied in"):
            check_writable(tmp_path / "b.json")
        tmp_path.chmod(0o700)


def test_a_write_that_is_refused_leaves_the_old_file(tmp_path):
    path = write_text(tmp_path / "a.txt", "old")
    with files_of_at_most(1000):
        with pytest.raises(UserError, match=r"out: .*a\.txt' cannot be written: File too large"):
            write_text(path, "new" * 1000)
        with (
            pytest.raises(UserError, match=r"model' cannot be written: File too large"),
            staged_folder(tmp_path / "model") as stage,
        ):
            (stage / "big").write_text("x" * 2000)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_a_folder_has_the_permissions_of_new_files(tmp_path):
    mask = os.umask(0o027)
    try:
        with staged_folder(tmp_path / "model") as stage:
            (stage / "inner").mkdir(0o700)
            save_file({"a": torch.zeros(1)}, stage / "inner" / "weights")  # for its owner only
    finally:
        os.umask(mask)
    folder, weights = tmp_path / "model", tmp_path / "model" / "inner" / "weights"
    modes = [path.stat().st_mode & 0o777 for path in (folder, weights.parent, weights)]
    assert modes == [0o750, 0o750, 0o640]


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_refusals_told_by_other_libraries_are_understood(tmp_path, save):
    tensors = {"a": torch.zeros(10_000)}
    with (
        files_of_at_most(1000),
        pytest.raises(UserError, match=r"x' cannot be written: .*(too large|disk may be full)"),
        writing(tmp_path / "x"),
    ):
        save(tensors, tmp_path / "x")


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG]
)
def test_refusals_of_the_system_name_path_and_reason(number):
    expected = rf"samples: 'a' cannot be written: {os.strerror(number)} \('b'\)$"
    with pytest.raises(UserError, match=expected), writing("a", "samples"):
        raise OSError(number, os.strerror(number), "b")


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), OSError("x"), ConnectionResetError(errno.ECONNRESET, "x"), ValueError()],
)
def test_what_is_no_refusal_stays_what_it_was(error):
    with pytest.raises(type(error)) as caught, writing("a"):
        raise error
    assert caught.value is error


def hold(path, pipe):
    with lock(path, "it"):
        pipe.send("held")
        pipe.recv()


@contextmanager
def held(path):
    """A process that holds the lock, and a pipe that ends it; it is killed if the test fails."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(path, theirs))
    process.start()
    try:
        assert ours.poll(SECONDS), "the process did not get the lock"
        assert ours.recv() == "held"
        yield process, ours
        process.join(SECONDS)
        assert process.exitcode is not None, "the process did not end"
    finally:
        process.kill()
        process.join()


def test_a_lock_is_held_by_one_and_freed_by_death(tmp_path):
    path = tmp_path / "new" / ".run.lock"
    assert not is_locked(path)
    for end in ("leave", "kill"):
        with held(path) as (process, ours):
            assert is_locked(path)
            busy = pytest.raises(UserError, match=r"^out: another process is using it$")
            with busy, lock(path, "out"):
                raise AssertionError
            if end == "leave":
                ours.send("leave")
            else:
                process.kill()
        assert path.exists() == (end == "kill")
        assert not is_locked(path)
        with lock(path, "out"):
            assert is_locked(path)
        assert not path.exists()


def test_a_lock_waits_for_one_that_ends(tmp_path):
    path = tmp_path / "lock"
    with held(path) as (_, ours):
        ours.send("leave")
        with lock(path, "it", patience=SECONDS):
            assert is_locked(path)
