from __future__ import annotations

import json
import math
import signal
from statistics import fmean

import pytest

from evaluation.killed import evaluate_until_killed
from oasis_attn.data.problems import Problem
from oasis_attn.errors import UserError
from oasis_attn.evaluation import evaluate
from oasis_attn.evaluation.problems import by_steps, pass_metrics
from oasis_attn.quantization import quantize
from oasis_attn.records import Record

ALL = ("perplexity", "gsm8k", "gsm8k-loglik", "arith")
SMALL = {"corpus": "prose", "window": 32, "max_new_tokens": 6, "shots": 1}


def plain(record):
    return json.loads(record.to_json()) | {"created": None}


@pytest.mark.usefixtures("data")
def test_every_task_gives_its_numbers(build, tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    record = evaluate(build(), tokenizer, tasks=ALL, limit=5, samples=tmp_path / "log", **SMALL)
    assert record.kind == "evaluation"
    assert {metric.name: metric.n for metric in record.metrics} == {
        "perplexity.windowed": 5,
        "loss.windowed": 5,
        "gsm8k.pass@1.strict": 5,
        "gsm8k.pass@1.flexible": 5,
        "gsm8k.lm_eval.strict-match": 5,
        "gsm8k.lm_eval.flexible-extract": 5,
        "gsm8k.answer_loglik": 5,
        "arith.pass@1.strict": 5,
        "arith.pass@1.flexible": 5,
    }
    intervals = record.intervals
    for metric in record.metrics:
        if ".lm_eval." not in metric.name:
            low, high = intervals[metric.name]
            assert low <= metric.value <= high
    assert record["perplexity.windowed"] == pytest.approx(math.exp(record["loss.windowed"]))
    assert set(record.data) == set(ALL)
    assert record.data["perplexity"]["tokens_scored"] == 5 * 31
    assert record.data["gsm8k"]["shots"] == 1
    for task in ALL:
        lines = (tmp_path / "log" / f"{task}.jsonl").read_text().splitlines()
        assert len(lines) == 1 + 5
    logged = [json.loads(line) for line in lines[1:]]
    assert {"id", "repeat", "prompt", "response", "reference", "strict", "flexible"} < set(
        logged[0]
    )
    assert Record.load(record.save(tmp_path / "r.json")) == record


@pytest.mark.usefixtures("data")
def test_right_answers_are_counted(build, tokenizer, monkeypatch):
    """A model that knows every other answer."""
    texts = iter([" #### 1", " So 2", "#### 0", "#### 4 apples", "no"])
    monkeypatch.setattr(
        "oasis_attn.evaluation.generate._continue",
        lambda _model, _tokenizer, rows, **_: [next(texts) for _ in rows],
    )
    pytest.importorskip("lm_eval")
    record = evaluate(build(), tokenizer, tasks=["gsm8k"], limit=5, shots=0, max_new_tokens=6)
    assert record["gsm8k.pass@1.strict"] == record["gsm8k.lm_eval.strict-match"] == 0.4
    assert record["gsm8k.pass@1.flexible"] == record["gsm8k.lm_eval.flexible-extract"] == 0.6
    assert record.tables["gsm8k.steps"] == [{"steps": 1, "samples": 5, "strict": 0.4}]


def test_pass_at_k_is_a_mean_over_problems():
    problems = [Problem(question="", answer=f"<<{i}>>\n#### {i}") for i in range(2)]
    responses = [["#### 0", "#### 1", "#### 1"], ["#### 1", "#### 1", "1"]]
    metrics, intervals = pass_metrics("t", problems, responses, [1, 2])
    values = {metric.name: metric.value for metric in metrics}
    assert values["t.pass@1.strict"] == pytest.approx(fmean([1 / 3, 2 / 3]))
    assert values["t.pass@2.strict"] == pytest.approx(fmean([2 / 3, 1]))
    assert values["t.pass@1.flexible"] == pytest.approx(fmean([1 / 3, 1]))
    assert set(intervals) == set(values)
    assert by_steps(problems, responses) == [{"steps": 1, "samples": 6, "strict": 0.5}]


def test_repeats_are_drawn_and_named(build, tokenizer):
    options = {"tasks": ["arith"], "limit": 3, "k": (1, 4), "repeats": 4, "temperature": 1.0}
    record = evaluate(build(), tokenizer, max_new_tokens=4, seed=3, **options)
    assert {"arith.pass@1.strict", "arith.pass@4.flexible"} < {m.name for m in record.metrics}
    assert record.seed == record.data["arith"]["seed"] == 3


@pytest.mark.usefixtures("data")
def test_a_stride_is_named(build, tokenizer):
    options = {"corpus": "prose", "window": 32, "limit": 4}
    record = evaluate(build(), tokenizer, stride=8, **options)
    assert record.data["perplexity"]["stride"] == 8
    assert record.data["perplexity"]["tokens_scored"] == 31 + 3 * 8
    assert record.data["perplexity"]["choice"] == "spread"
    assert record["loss.strided"] != evaluate(build(), tokenizer, **options)["loss.windowed"]


@pytest.mark.usefixtures("data")
def test_a_killed_run_goes_on_to_the_same_record(build, tokenizer, tmp_path):
    folder = tmp_path / "model"
    build("vanilla").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options = {
        "tasks": ["perplexity", "arith"], "limit": 7, "batch_size": 2, "repeats": 2,
        "temperature": 0.8, "corpus": "prose", "window": 32, "max_new_tokens": 6,
    }  # fmt: skip
    whole = evaluate(folder, samples=tmp_path / "whole", **options)
    code = evaluate_until_killed(folder, samples=tmp_path / "cut", **options)
    assert code == -signal.SIGKILL
    logs = {name: tmp_path / name / "arith.jsonl" for name in ("cut", "whole")}
    assert logs["cut"].read_bytes().endswith(b"half a li")
    resumed = evaluate(folder, samples=tmp_path / "cut", resume=True, **options)
    assert plain(resumed) == plain(whole)
    assert logs["cut"].read_bytes() == logs["whole"].read_bytes()


def test_another_model_or_other_notes_take_nothing_from_the_log(build, tokenizer, tmp_path):
    options = {"tasks": ["arith"], "limit": 2, "max_new_tokens": 6, "samples": tmp_path}
    model = build("vanilla")
    evaluate(model, tokenizer, **options)
    log = tmp_path / "arith.jsonl"
    count = len(log.read_text().splitlines())
    again = evaluate(model, tokenizer, resume=True, **options)
    assert len(log.read_text().splitlines()) == count
    for other, more in ((build("oasis"), {}), (quantize(model, "w4a4"), {}), (model, {"x": 1})):
        record = evaluate(other, tokenizer, resume=True, model_notes=more, **options)
        count += 3
        assert len(log.read_text().splitlines()) == count
        assert (record.sha256 == again.sha256) == (other is model)
        assert record.model_notes == more


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["gsm9k"]}, "did you mean 'gsm8k'"),
        ({"tasks": "arith"}, "is not a list"),
        ({"tasks": []}, "is not a list"),
        ({"tasks": ["arith", "arith"]}, "all different"),
        ({"corpus": "wikitext2"}, "did you mean 'wikitext-2'"),
        ({"split": "tset"}, "did you mean 'test'"),
        ({"window": 1}, "window: 1"),
        ({"window": 2.5}, "window: 2.5 is not a whole number"),
        ({"stride": 0}, "stride: 0"),
        ({"stride": 600}, "stride: 600 is more than the window of 512"),
        ({"shots": -1}, "shots: -1"),
        ({"k": (2,)}, "k: 2 is more than repeats=1"),
        ({"k": (0,)}, "k: 0"),
        ({"repeats": 2}, "give a temperature"),
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"seed": -1}, "seed: -1"),
        ({"limit": 0}, "limit: 0"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"resume": True}, "resume: it needs samples"),
        ({"batchsize": 2}, "options: 'batchsize' is not one of .*; did you mean 'batch_size'"),
        ({"tokenizer": None}, "tokenizer: None"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(object(), **{"tokenizer": tokenizer} | options)


@pytest.mark.usefixtures("data")
def test_every_task_is_checked_before_the_first_runs(build, tokenizer, tmp_path):
    tasks, log = ["perplexity", "arith"], tmp_path / "log"
    with pytest.raises(UserError, match=r"prompt with max_new_tokens: .* 256 positions"):
        evaluate(
            build(), tokenizer, tasks=tasks, corpus="prose", window=64, max_new_tokens=250,
            samples=log,
        )  # fmt: skip
    assert not log.exists()


@pytest.mark.usefixtures("data")
def test_a_model_that_is_broken_has_no_finite_perplexity(build, tokenizer):
    model = build()
    model.lm_head.weight.data *= 1e6
    record = evaluate(model, tokenizer, corpus="prose", window=64, limit=4)
    assert record["loss.windowed"] > 710
    assert record["perplexity.windowed"] == float("inf")


@pytest.mark.usefixtures("data")
def test_a_window_longer_than_the_model(build, tokenizer):
    with pytest.raises(
        UserError, match=r"window: 300 tokens are more than the model.s 256 positions"
    ):
        evaluate(build(), tokenizer, corpus="prose", window=300)


def test_a_log_that_exists_is_not_mixed_with(build, tokenizer, tmp_path):
    (tmp_path / "arith.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"samples: .* exists"):
        evaluate(build(), tokenizer, tasks=["arith"], samples=tmp_path)
