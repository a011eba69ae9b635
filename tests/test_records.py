"""Records are read back as they were written, and nothing else is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from example_records import ENVIRONMENT, TEXT, diagnosis, model_info, quantization
from oasis_attn.errors import UserError
from oasis_attn.records import (
    BenchmarkRecord,
    BlocksInfo,
    ConversionRecord,
    DiagnosisRecord,
    DoctorRecord,
    EvaluationRecord,
    Metric,
    PrefixRecord,
    Record,
    TrainingData,
    TrainingRecord,
    TrialRecord,
    Try,
)

BLOCKS = BlocksInfo(split="train", blocks=3, sha256="0")
COMMON = {
    "seed": 1,
    "metrics": (Metric(name="b", value=1.0, where="c", n=2, standard_error=0.5),),
    "tables": {"loss": [{"step": 1, "loss": 2.0}]},
    "environment": replace(ENVIRONMENT, versions={"torch": "1"}),
}
OF_MODEL = COMMON | {"model": model_info(variant="oasis", config={"residual": "depth"})}
EXAMPLES = [
    BenchmarkRecord(name="speed", settings={"rounds": 2}, data={"commands": ["a"]}, **COMMON),
    ConversionRecord(
        config={"residual": "sum"},
        nulls=2,
        bos="c",
        layer_0="b",
        tokens=(1,),
        texts=("a",),
        neurons=((2, 430),),
        data=TEXT,
        calibration=TEXT,
        **OF_MODEL,
    ),
    DiagnosisRecord(data=TEXT, **OF_MODEL),
    DoctorRecord(
        sha256="0",
        scheme={"name": "w8a8"},
        tolerance=0.5,
        tries=(Try(name="prefix", scheme={"name": "w8a8"}, prefix=(3,), problem="too short"),),
        data=TEXT,
        calibration=TEXT,
        **OF_MODEL,
    ),
    EvaluationRecord(
        sha256="0",
        model_notes={"kv_cache": {"bits": 4}},
        data={"arith": {"problems": 2}},
        intervals={"b": (0.5, float("inf"))},
        **OF_MODEL,
    ),
    PrefixRecord(
        tokens=(1, 2),
        text="a b",
        method="greedy",
        tune_steps=0,
        scheme={"name": "w8a8"},
        data=TEXT,
        calibration=TEXT,
        **OF_MODEL,
    ),
    quantization(**OF_MODEL),
    TrainingRecord(
        trained_parameters=1,
        weights_sha256=None,
        training={"steps": 3},
        processes=1,
        data=TrainingData(
            corpus="made up",
            corpus_sha256="1",
            tokenizer_sha256="2",
            block_length=8,
            train=BLOCKS,
            eval=TEXT,
        ),
        **OF_MODEL,
    ),
    TrialRecord(
        trial={"seed": 1},
        command="again",
        trained_parameters=1,
        targets={"w8a8": 3},
        tokenizer_sha256="0",
        train=BLOCKS,
        train_corpus_sha256="0",
        data=TEXT,
        calibration_windows=2,
        **OF_MODEL,
    ),
]


def by_kind(record: Record) -> str:
    return record.kind


def places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where mappings and lists of a JSON value hold something, at every depth."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def changed(value: dict, path: tuple[str | int, ...], new: object = None, *, drop: bool = False):
    """A copy of a JSON value in which one place holds another value, or is gone."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return copy


def load(path: Path, value: object) -> Record:
    path.write_text(json.dumps(value))
    return Record.load(path)


def test_every_kind_has_an_example():
    def kinds(base: type[Record]) -> set[str]:
        own = {base.kind} if "kind" in vars(base) else set()
        return own.union(*map(kinds, base.__subclasses__()))

    assert kinds(Record) == {record.kind for record in EXAMPLES}


@pytest.mark.parametrize("record", EXAMPLES, ids=by_kind)
def test_a_record_is_read_back_as_it_was(record, tmp_path):
    path = record.save(tmp_path / "record.json")
    for reader in (Record, type(record)):
        again = reader.load(path)
        assert type(again) is type(record)
        assert again == record
    assert Record.from_json(record.to_json(indent=None), "line 1") == record
    other = next(each for each in EXAMPLES if each.kind != record.kind)
    with pytest.raises(UserError, match=rf"json' .*\(kind: '{record.kind}' is not one of "):
        type(other).load(path)


def test_numbers_that_are_not_finite_are_read_back_as_they_were(tmp_path):
    nan = float("nan")
    metrics = (Metric(name="a", value=nan, standard_error=nan), Metric(name="b", value=-1e400))
    again = Record.load(diagnosis(metrics=metrics).save(tmp_path / "record.json"))
    assert repr(again.metrics) == repr(metrics)


FREE = {"tables", "settings", "config", "model_notes", "scheme", "training", "trial"}
"""What is below these keys is not checked."""


@pytest.mark.parametrize("record", EXAMPLES, ids=by_kind)
def test_a_value_of_another_type_is_refused_by_its_place(record, tmp_path):
    good, path = json.loads(record.to_json()), tmp_path / "record.json"
    free = FREE | {"data"} if record.kind in ("benchmark", "evaluation") else FREE
    for place in places(good):
        if place == ("kind",) or free.intersection(place[:-1]):
            continue
        name = place[-1] if isinstance(place[-1], str) else f"[{place[-1]}]"
        for value in (True, [None]):
            with pytest.raises(
                UserError, match=r"json' is not a readable record \(.+\)$"
            ) as caught:
                load(path, changed(good, place, value))
            assert name in str(caught.value)


@pytest.mark.parametrize("record", EXAMPLES, ids=by_kind)
def test_a_missing_or_unknown_key_is_refused(record, tmp_path):
    good, path = json.loads(record.to_json()), tmp_path / "record.json"
    parts = [(), ("environment",), ("metrics", 0)]
    parts += [(name,) for name in ("model", "calibration", "train") if name in good]
    if record.kind not in ("benchmark", "evaluation"):
        parts.append(("data",))
    for part in parts:
        with pytest.raises(UserError, match=r"key 'more' is unknown; allowed are [a-z]"):
            load(path, changed(good, (*part, "more"), 1))
        inner = good
        for key in part:
            inner = inner[key]
        for key in inner:
            with pytest.raises(UserError, match=f"key '{key}' is missing|^record: .*{key}: None"):
                load(path, changed(good, (*part, key), drop=True))


def test_unknown_kinds_and_versions_are_refused(tmp_path):
    good, path = json.loads(diagnosis().to_json()), tmp_path / "record.json"
    with pytest.raises(UserError, match=r"kind: 'diagnose' is not one of .*did you mean"):
        load(path, good | {"kind": "diagnose"})
    for version in (1, "2", None, True):
        with pytest.raises(UserError, match=r"version: .* of kind 'diagnosis' is not 2"):
            load(path, good | {"version": version})


@pytest.mark.parametrize("text", [b"", b"[" * 10_000, b"\xff", b"9" * 5000, b"null", b"[]", b"{}"])
def test_any_other_file_is_refused(text, tmp_path):
    path = tmp_path / "record.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"record: .*json' is not a readable record \(.+\)$"):
        Record.load(path)
