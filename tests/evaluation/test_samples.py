from __future__ import annotations

import json

import pytest

from full_disk import files_of_at_most
from oasis_attn.errors import UserError
from oasis_attn.evaluation.samples import SampleLog

PROTOCOL = {"task": "t", "seed": 0}


def sample(index: int, repeat: int = 0, **more):
    return {"id": index, "repeat": repeat, "response": f"é\n{index}"} | more


def test_samples_are_taken_up_again(tmp_path):
    path = tmp_path / "deep" / "t.jsonl"
    SampleLog(path, PROTOCOL, resume=False).add([sample(0), sample(0, 1), sample(1)])
    log = SampleLog(path, PROTOCOL, resume=True)
    assert (0, 1) in log
    assert (1, 1) not in log
    assert log[1, 0] == sample(1)
    log.add([sample(1, response="other"), sample(2)])
    assert log[1, 0] == sample(1)
    lines = path.read_text().splitlines()
    assert len(lines) == 5  # the settings, and four samples
    assert json.loads(lines[0])["description"] == PROTOCOL


def test_every_cut_of_the_file_resumes_from_the_whole_lines(tmp_path):
    path = tmp_path / "t.jsonl"
    SampleLog(path, PROTOCOL, resume=False).add([sample(0), sample(1)])
    data = path.read_bytes()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        log = SampleLog(path, PROTOCOL, resume=True)
        assert [(i, 0) in log for i in range(2)] == [data[:length].count(b"\n") > n for n in (1, 2)]
        log.add([sample(0), sample(1)])
        assert path.read_bytes() == data


def test_other_settings_samples_are_left_alone(tmp_path):
    path = tmp_path / "t.jsonl"
    SampleLog(path, PROTOCOL, resume=False).add([sample(0)])
    other = SampleLog(path, PROTOCOL | {"seed": 1}, resume=True)
    assert (0, 0) not in other
    other.add([sample(0, response="other")])
    assert SampleLog(path, PROTOCOL, resume=True)[0, 0] == sample(0)


def test_a_log_is_not_mixed_with_unasked(tmp_path):
    path = tmp_path / "t.jsonl"
    SampleLog(path, PROTOCOL, resume=False)
    with pytest.raises(UserError, match="exists; resume it"):
        SampleLog(path, PROTOCOL, resume=False)


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"id": 0}', '{"protocol": "%s"}', "\N{SNOWMAN}"])
def test_a_line_of_another_form_is_named(tmp_path, line):
    path = tmp_path / "t.jsonl"
    log = SampleLog(path, PROTOCOL, resume=False)
    log.add([sample(0)])
    with path.open("a") as file:
        file.write(line.replace("%s", log.protocol) + "\n")
    with pytest.raises(UserError, match="line 3 is not a logged sample"):
        SampleLog(path, PROTOCOL, resume=True)


def test_without_a_path_samples_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = SampleLog(None, PROTOCOL, resume=False)
    log.add([sample(3)])
    assert log[3, 0] == sample(3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"response": None}, {"response": 3}, {"tokens": 0}, {"tokens": 1.0}, {"loss": None},
        {"id": "0"}, {"id": True}, {"repeat": None},
    ],
)  # fmt: skip
def test_samples_say_what_they_are_for_in_the_right_types(tmp_path, change):
    path = tmp_path / "t.jsonl"
    fields = {"response": str, "tokens": int, "loss": float}
    good = sample(0) | {"tokens": 3, "loss": float("nan")}
    log = SampleLog(path, PROTOCOL, fields=fields, resume=False)
    log.add([good])
    assert (0, 0) in SampleLog(path, PROTOCOL, fields=fields, resume=True)
    with path.open("a") as file:
        file.write(json.dumps(good | {"protocol": log.protocol} | change) + "\n")
    with pytest.raises(UserError, match=r"samples: .* line 3 is not a logged sample"):
        SampleLog(path, PROTOCOL, fields=fields, resume=True)


def test_a_full_disk_is_told_and_the_log_goes_on(tmp_path):
    path = tmp_path / "t.jsonl"
    log = SampleLog(path, PROTOCOL, resume=False)
    rows = [sample(index, response="x" * 99) for index in range(20)]
    with (
        files_of_at_most(1000),
        pytest.raises(UserError, match=r"samples: .*t\.jsonl' cannot be written: File too large"),
    ):
        log.add(rows)
    assert (0, 0) not in log
    again = SampleLog(path, PROTOCOL, resume=True)
    assert (0, 0) in again
    assert (19, 0) not in again
    again.add(rows)
    assert [(19, 0) in SampleLog(path, PROTOCOL, resume=True)] == [True]
