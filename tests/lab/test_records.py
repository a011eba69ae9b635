"""The committed records and tables of the lab are those of the committed runs."""

import importlib.util
import sys
from pathlib import Path

import pytest

from oasis_attn.lab.runs import RunFile
from oasis_attn.modeling.null_logit import LOG_CONTEXT_MARGIN
from oasis_attn.records import BenchmarkRecord
from oasis_attn.report.markdown import markdown

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "lab"


def experiment(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def approximately(values):
    return [(m.name, m.where, pytest.approx(m.value, rel=1e-6), m.n) for m in values]


def test_source(monkeypatch):
    source = experiment("source_result", monkeypatch)
    folder = RESULTS / "source"
    file, record = RunFile(folder / "runs.jsonl"), BenchmarkRecord.load(folder / "record.json")
    assert [(m.name, m.where, m.value, m.n) for m in record.metrics] == approximately(
        source.make_record(file).metrics
    )
    assert (folder / "table.md").read_text() == markdown(source.table(file))
    for where in ("1 layer of 1 head", "2 layers of 2 heads", "4 layers of 4 heads"):
        softmax, relu = (
            record.metric("attention_only.sink_idle", f"{arm}, {where}").value
            for arm in ("softmax", "ReLU")
        )
        assert softmax > 0.95
        assert relu < 0.01


def test_null_law(monkeypatch):
    law = experiment("null_law", monkeypatch)
    folder = RESULTS / "null_law"
    file, record = RunFile(folder / "runs.jsonl"), BenchmarkRecord.load(folder / "record.json")
    again = law.make_record(file, record.tables["dynamics"])
    assert [(m.name, m.where, m.value, m.n) for m in record.metrics] == approximately(again.metrics)
    assert (folder / "tables.md").read_text() == law.tables(record)
    names = [group.name for group in law.GROUPS]
    assert len(set(names)) == len(names)
    assert {row["group"] for row in file.rows} <= {*names}


def test_the_margin_of_log_context_removes_every_measured_sink():
    record = BenchmarkRecord.load(RESULTS / "null_law" / "record.json")
    largest = record.metric("null_law.margin@0.02").value
    assert 1 < largest < LOG_CONTEXT_MARGIN < largest + 1
