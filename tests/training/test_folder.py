"""The folder of a run: one process at a time, and what the system refuses to write."""

from __future__ import annotations

import time

import pytest

from full_disk import files_of_at_most
from oasis_attn.errors import UserError
from oasis_attn.files import is_locked, lock
from oasis_attn.records import TrainingRecord
from oasis_attn.training import run as run_module
from oasis_attn.training import train
from training import processes


def quiet(config) -> TrainingRecord:
    return train(config, progress=False)


def losses(record: TrainingRecord) -> list[float]:
    return [row["loss"] for row in record.tables["loss"]]


def test_one_process_at_a_time(configure):
    config = configure("new/run", steps=2)
    place = config.out.parent / ".run.lock"
    message = r"out: '.*run': another process is using it"
    with lock(place, "it"):
        with pytest.raises(UserError, match=message):
            quiet(config)
        assert not config.out.exists()
    quiet(config)
    assert not place.exists()
    with lock(place, "it"), pytest.raises(UserError, match=message):
        quiet(configure("new/run", steps=2, resume=True))
    with pytest.raises(UserError, match=r"exists; give a new folder.* resume=True"):
        quiet(config)


def test_a_killed_run_leaves_no_lock_that_counts(configure):
    config = configure(steps=10_000, save_every=10_000)
    process = processes.start(config, processes.DDP)
    place = config.out.parent / ".run.lock"
    end = time.monotonic() + 120
    while not (config.out / "run.json").is_file():
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.05)
    assert is_locked(place)
    with pytest.raises(UserError, match="another process"):
        quiet(configure(steps=10_000, save_every=10_000, resume=True))
    process.kill()
    process.join()
    assert place.exists()
    with pytest.raises(UserError, match="has steps 10000, but this run has 2"):
        quiet(configure(steps=2, resume=True))
    assert not place.exists()


def test_bad_input_leaves_no_lock(configure, tmp_path):
    with pytest.raises(UserError, match="block_length"):
        quiet(configure(block_length=257))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["checkpoint", "end"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(configure, when):
    expected = losses(quiet(configure("whole", steps=8)))
    config = configure(steps=8, save_every=4 if when == "checkpoint" else 8)
    with (
        files_of_at_most(20_000),
        pytest.raises(UserError, match=r"^out: '.*' cannot be written: ") as caught,
    ):
        quiet(config)
    assert "\n" not in str(caught.value)
    assert not list(config.out.glob("checkpoints/checkpoint-*"))
    assert not (config.out / "config.json").exists()
    assert not (config.out / "record.json").exists()
    resumed = quiet(configure(steps=8, save_every=config.save_every, resume=True))
    assert losses(resumed) == expected


def test_a_folder_that_cannot_be_made_is_told_before_any_work(configure, monkeypatch):
    monkeypatch.setattr(run_module, "prepare", None)
    for out in ("/proc/x/y", "/dev/null/run", "/proc/" + "a" * 5000):
        with pytest.raises(UserError, match=r"^out: .* cannot be written"):
            quiet(configure(out))
        with pytest.raises(UserError, match=r"^resume: .* contains no run to resume"):
            quiet(configure(out, resume=True))
