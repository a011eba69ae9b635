"""The committed records and tables of the lab are those of the committed runs."""

import importlib.util
import math
import sys
from pathlib import Path
from statistics import fmean

import pytest

from oasis_attn.lab.runs import RunFile
from oasis_attn.modeling.null_logit import LOG_CONTEXT_MARGIN
from oasis_attn.records import BenchmarkRecord
from oasis_attn.report.markdown import markdown

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "lab"


def experiment(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
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
    law = experiment("null_law_report", monkeypatch)
    folder = RESULTS / "null_law"
    file, record = RunFile(folder / "runs.jsonl"), BenchmarkRecord.load(folder / "record.json")
    again = law.make_record(file, record.tables["dynamics"])
    assert [(m.name, m.where, m.value, m.n) for m in record.metrics] == approximately(again.metrics)
    assert (folder / "tables.md").read_text() == law.tables(record)
    names = [group.name for group in law.GROUPS]
    assert len(set(names)) == len(names)
    assert {row["group"] for row in file.rows} <= {*names}


@pytest.mark.parametrize(
    ("folder", "name"),
    [("null_law_decoders", "null_law_decoders_report"), ("null_law_cells", "null_law_cells")],
)
def test_null_law_of_decoders_and_language_models(monkeypatch, folder, name):
    law = experiment(name, monkeypatch)
    file = RunFile(RESULTS / folder / "runs.jsonl.gz")
    record = BenchmarkRecord.load(RESULTS / folder / "record.json")
    again = law.make_record(file)
    assert [(m.name, m.where, m.value, m.n) for m in record.metrics] == approximately(again.metrics)
    assert (RESULTS / folder / "tables.md").read_text() == law.tables(record)


def test_the_margin_of_log_context_removes_every_measured_sink():
    record = BenchmarkRecord.load(RESULTS / "null_law" / "record.json")
    largest = record.metric("null_law.margin@0.02").value
    assert 1 < largest < LOG_CONTEXT_MARGIN < largest + 1


def test_the_law_of_the_null_ends_at_256_tokens():
    record = BenchmarkRecord.load(RESULTS / "null_law" / "record.json")
    rows = {row["group"]: row for row in record.tables["thresholds"]}
    large, small = (rows[f"length 256, 1x1, batch {size}"] for size in (32, 8))
    for level in large["thresholds"]:
        means = [fmean(row["thresholds"][level]) for row in (large, small)]
        assert abs(means[0] - means[1]) < 0.2
    for length in (512, 1024):
        row = rows[f"length {length}, 1x1, batch 8"]
        assert max(row["thresholds"]["0.02"]) < 5.6 < math.log(length)
    assert (row["solved"], row["runs"]) == (2, 25)


def test_the_nulls_of_language_models(monkeypatch):
    law = experiment("null_law_cells", monkeypatch)
    file = RunFile(RESULTS / "null_law_cells" / "runs.jsonl.gz")
    assert not list(law.missing(file))
    rows = {(row["group"], row["null"], row["seed"]): row for row in file.rows}
    sinks = {key: max(map(max, row["sink"])) for key, row in rows.items()}
    softmax = {key: sink for key, sink in sinks.items() if key[1] is None}
    assert sorted(sink > 0.78 for key, sink in softmax.items() if "128" in key[0]) == [0, 1, 1, 1]
    assert all(sink < 0.08 for key, sink in softmax.items() if "128" not in key[0])
    assert all(sink < 0.05 for key, sink in sinks.items() if key[1] == "log n + 2")
    gains = []
    for key in softmax:
        with_key = key[0], law.KEY, key[2]
        assert sinks[with_key] < 0.06
        assert rows[with_key]["other_loss"] - rows[key]["other_loss"] < 0.0033
        gains.append(rows[with_key]["accuracy"] - rows[key]["accuracy"])
    gains.sort()
    assert -0.0065 < gains[0] < 0 < gains[1]
    assert gains[-1] == pytest.approx(0.06, abs=0.005)


def test_the_thresholds_in_decoders():
    record = BenchmarkRecord.load(RESULTS / "null_law_decoders" / "record.json")
    found = {"sum": [], "depth": []}
    for row in record.tables["thresholds"]:
        found[row["residual"]] += [(row["length"], c) for c in row["thresholds"]["0.02"]]
    short = {key: [c for n, c in values if n <= 128] for key, values in found.items()}
    assert [min(short["sum"]), max(short["sum"])] == pytest.approx([2.7, 5.6], abs=0.05)
    assert [min(short["depth"]), max(short["depth"])] == pytest.approx([5.3, 7.6], abs=0.05)
    above = {
        key: [n for n, c in values if c > math.log(n) + LOG_CONTEXT_MARGIN]
        for key, values in found.items()
    }
    assert max(above["sum"]) == 32
    assert max(above["depth"]) == 128
    slopes = [record.tables["fits"][f"{key}@0.02"]["slope_interval"] for key in ("sum", "depth")]
    assert slopes[0][0] < 0 < slopes[0][1] < 0.2
    assert slopes[1][1] < 0


def test_decoders_of_one_head():
    record = BenchmarkRecord.load(RESULTS / "one_head" / "record.json")
    sinks, errors = {}, {}
    for run in record.tables["runs"]:
        sinks.setdefault(run["arm"], []).append(run["sink.idle"])
        errors.setdefault(run["arm"], []).append(run["task.relative_error"])
    assert {len(values) for values in sinks.values()} == {3}
    for arm in ("vanilla", "softmax1, 0", "gated_attention", "attn_residual"):
        assert min(sinks[arm]) > 0.99
    for arm in ("softmax1, 5", "softmax1, 8", "value_null, 5", "softpick"):
        assert max(sinks[arm]) < 0.005
        assert min(errors[arm]) > max(errors["vanilla"])
    assert [min(sinks["oasis, 5"]), max(sinks["oasis, 5"])] == pytest.approx(
        [0.25, 0.52], abs=0.005
    )


def test_a_decoder_of_one_head_is_measured_as_the_record_says(monkeypatch):
    law = experiment("one_head", monkeypatch)
    monkeypatch.setattr(law, "ARMS", {"vanilla": ("vanilla", {}, 2)})
    row = law.run("vanilla", 0)
    assert row.keys() == {"arm", "seed", *law.MEASURED}
    assert 0 < row["task.relative_error"] < 10


def test_a_null_that_rises_after_training():
    runs = BenchmarkRecord.load(RESULTS / "null_anneal" / "record.json").tables["runs"]
    assert all(0.845 < run["sink.max_mass"] < 0.86 for run in runs)
    by_logit = {}
    for run in runs:
        by_logit.setdefault(run["null_logit"], []).append(run)
    assert {len(each) for each in by_logit.values()} == {3}
    means = [fmean(run["sink.mass"] for run in each) for each in by_logit.values()]
    assert means[2:] == sorted(means[2:], reverse=True)
    schemes = "w8a8-static-full", "w4a4"
    costs = {
        name: [run[f"perplexity.windowed@{scheme}"] / run["perplexity.windowed"] - 1
               for run in each for scheme in schemes]
        for name, each in by_logit.items()
    }  # fmt: skip
    assert max(costs["softmax"] + costs["0"]) < 0.02
    assert min(costs["log n + 2"]) > 0.0199
    assert max(costs["log n + 2"]) < 0.175
    for one, other in zip(by_logit["log n + 2"], by_logit["softmax"], strict=True):
        assert one["perplexity.windowed"] / other["perplexity.windowed"] < 1.005
