"""`kill -9` at any moment, in the middle of a save too."""

from __future__ import annotations

import random
import signal
import time

import pytest

from oasis_attn.records import TrainingRecord
from oasis_attn.training import train
from oasis_attn.training.checkpoints import last_checkpoint
from training import processes

LONG = {"steps": 60, "save_every": 2}


def losses(record: TrainingRecord) -> list[float]:
    return [row["loss"] for row in record.tables["loss"]]


def newest(config) -> int:
    found = config.out.glob("checkpoints/checkpoint-*")
    return max((int(path.name.removeprefix("checkpoint-")) for path in found), default=0)


def kill(process) -> None:
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run had ended before it was killed"


def wait(condition, process) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.0005)


@pytest.fixture(scope="module")
def whole():
    found: list[list[float]] = []

    def of(configure) -> list[float]:
        if not found:
            found.append(losses(train(configure("whole", **LONG), progress=False)))
        return found[0]

    return of


def test_killed_again_and_again(configure, whole):
    """Each kill is followed by a run that goes on from the newest checkpoint there was."""
    expected = whole(configure)
    draw = random.Random(0)
    config = configure("killed", **LONG)
    reached = 0
    for kills in range(5):
        process = processes.start(configure("killed", **LONG, resume=kills > 0), {})
        if kills % 2:
            wait(lambda: (config.out / "run.json").exists(), process)
            staging = config.out / "checkpoints" / ".staged"
            # A save has begun; at some moment of it.
            wait(lambda: newest(config) > reached and any(staging.glob("*")), process)  # noqa: B023
            time.sleep(draw.uniform(0, 0.02))
        else:
            wait(lambda: newest(config) > reached, process)  # noqa: B023
            time.sleep(draw.uniform(0, 0.1))
        kill(process)
        assert newest(config) > reached
        reached = newest(config)
        assert last_checkpoint(config.out / "checkpoints", {"steps": 60}) is not None
    assert not (config.out / "config.json").exists()
    resumed = train(configure("killed", **LONG, resume=True), progress=False)
    assert losses(resumed) == expected


def test_killed_before_it_began(configure, whole):
    config = configure("killed", **LONG)
    config.out.mkdir()
    (config.out / ".run.json.half").write_text("{")
    resumed = train(configure("killed", **LONG, resume=True), progress=False)
    assert losses(resumed) == whole(configure)


def test_killed_while_the_finished_model_is_saved(configure, whole):
    config = configure("killed", **LONG)
    process = processes.start(config, {})
    wait((config.out / ".staged").exists, process)
    kill(process)
    resumed = train(configure("killed", **LONG, resume=True), progress=False)
    assert losses(resumed) == whole(configure)
    assert not (config.out / ".staged").exists()
