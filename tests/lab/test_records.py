"""The committed records and tables of the lab are those of the committed runs."""

import importlib.util
import math
import sys
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean

import pytest

from oasis_attn.lab.null_law import fit_line
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


def test_only_a_null_above_log_n_removes_the_sink_of_one_layer_and_head():
    rows = RunFile(RESULTS / "source" / "runs.jsonl").rows
    for arm, low, high in (
        ("softmax", 0.999, 1),
        ("softmax1, c = 0", 0.993, 0.9985),
        ("softmax1, c = 2", 0.95, 0.985),
        ("softmax1, c = 4.5", 0, 0.001),
        ("softpick", 0, 0.01),
        ("ReLU", 0, 0),
    ):
        runs = [row for row in rows if row["group"] == f"{arm}, 1 layer of 1 head"]
        assert [row["seed"] for row in runs] == [0, 1, 2]
        assert all(low <= row["sink_idle"][0][0] <= high for row in runs)
        assert all(650 < row["steps"] < 1300 for row in runs)


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
    means = [
        fmean(rows[f"length {length}, 1x1, batch 32"]["thresholds"]["0.02"])
        for length in (16, 64, 256)
    ]
    slopes = [(high - low) / math.log(4) for low, high in pairwise(means)]
    assert slopes == pytest.approx([1.2, 0.6], abs=0.05)
    moved = [
        abs(last - row["null_logit"])
        for row in record.tables["arms"]
        if row["group"].startswith("length 64, 1x1, batch 32, learned_sink")
        for last in row["last_null_logit"]
    ]
    assert 0.9 < max(moved) < 1


def test_the_nulls_of_language_models(monkeypatch):
    law = experiment("null_law_cells", monkeypatch)
    file = RunFile(RESULTS / "null_law_cells" / "runs.jsonl.gz")
    assert not list(law.missing(file))
    rows = {(row["group"], row["null"], row["seed"]): row for row in file.rows}
    sinks = {key: max(map(max, row["sink"])) for key, row in rows.items()}
    softmax = {key: sink for key, sink in sinks.items() if key[1] is None}
    short = {key: sink for key, sink in softmax.items() if key[0].endswith("window 128")}
    assert sorted(sink > 0.78 for sink in short.values()) == [0, 1, 1, 1]
    assert all(sink < 0.05 for key, sink in sinks.items() if key[1] == "log n + 2")
    assert all(sink < 0.0601 for key, sink in sinks.items() if key[1] == law.KEY)

    def of(cell: str, null: str | None) -> list[float]:
        """The largest sinks: the seeds with a residual sum, then those with depth routing."""
        keys = [(f"{residual}, {cell}", null) for residual in law.RESIDUALS]
        return [sinks[*key, seed] for key in keys for seed in range(law.CELLS[cell].seeds)]

    def gains(null: str, *cells: str) -> list[float]:
        """Right answers more than those of softmax with the same seed."""
        groups = [f"{residual}, {cell}" for residual in law.RESIDUALS for cell in cells]
        return sorted(
            rows[key]["accuracy"] - rows[key[0], None, key[2]]["accuracy"]
            for key in rows
            if key[0] in groups and key[1] == null
        )

    assert of("window 256", None) == pytest.approx([0.17, 0.79, 0.30, 0.19], abs=0.005)
    assert max(of("window 512", None)) < 0.06
    long = "window 512, after 128"
    assert of(long, None) == pytest.approx([0.62, 0.90, 0.34, 0.13], abs=0.005)
    assert of(long, "0") == pytest.approx([0.90, 0.86, 0.95, 0.25], abs=0.005)
    assert max(of(long, "log n") + of(long, "log n + 2")) < 0.03
    constant = gains("log n + 2", "window 256")
    assert [constant[0], constant[-1]] == pytest.approx([-0.035, -0.003], abs=0.0005)
    constant = gains("log n + 2", long)
    assert constant[-1] == pytest.approx(0.01, abs=0.0005)
    assert [constant[0], constant[-2]] == pytest.approx([-0.046, -0.0245], abs=0.0005)
    keys = gains(law.KEY, long)
    assert [keys[0], keys[-1]] == pytest.approx([0.003, 0.0106], abs=0.0005)
    keys = gains(law.KEY, *law.CELLS)
    assert (len(keys), sum(gain > 0 for gain in keys)) == (14, 11)
    assert [keys[0], keys[-1]] == pytest.approx([-0.006, 0.025], abs=0.0005)
    for key in short:
        added = rows[key[0], law.KEY, key[2]]["other_loss"] - rows[key]["other_loss"]
        assert added < 0.0033


def test_the_thresholds_in_decoders():
    record = BenchmarkRecord.load(RESULTS / "null_law_decoders" / "record.json")
    assert record.settings["left_out"] == 0
    found = {"sum": [], "depth": []}
    for row in record.tables["thresholds"]:
        found[row["residual"]] += [(row["length"], c) for c in row["thresholds"]["0.02"]]
    ranges = {
        key: (min(c for _, c in each), max(c for _, c in each)) for key, each in found.items()
    }
    assert ranges["sum"] == pytest.approx((2.7, 5.6), abs=0.05)
    assert ranges["depth"] == pytest.approx((4.3, 7.9), abs=0.05)
    above = {
        key: [n for n, c in values if c > math.log(n) + LOG_CONTEXT_MARGIN]
        for key, values in found.items()
    }
    assert max(above["sum"]) == 32
    assert max(above["depth"]) == 256
    tables = {
        (row["residual"], row["length"], row["layers"], row["heads"]): row["thresholds"]
        for row in record.tables["thresholds"]
    }
    lengths = (16, 32, 64, 128, 256, 512, 1024)
    for residual, level in product(found, ("0.5", "0.02")):
        points = [(math.log(n), c) for n in lengths for c in tables[residual, n, 1, 2][level]]
        assert len(points) == 35
        assert fit_line(*zip(*points, strict=True)).slope < 0.3
    thresholds = {key: table["0.02"] for key, table in tables.items()}
    means = {key: fmean(each) for key, each in thresholds.items()}
    for length, mean in {16: 4.2, 64: 3.6, 1024: 5}.items():
        assert means["sum", length, 1, 2] == pytest.approx(mean, abs=0.05)
    routed = [means["depth", length, 1, 2] for length in lengths]
    assert [min(routed), max(routed)] == pytest.approx([6.1, 7], abs=0.05)
    for first, slope in {64: 0.5, 256: 0.8}.items():
        points = [
            (math.log(n), c) for n in lengths if n >= first for c in thresholds["sum", n, 1, 2]
        ]
        assert fit_line(*zip(*points, strict=True)).slope == pytest.approx(slope, abs=0.05)
    for length in (256, 512, 1024):
        each = thresholds["depth", length, 1, 2]
        assert max(each) - min(each) > 2
    for residual in ("sum", "depth"):
        one, two, *deeper = (fmean(thresholds[residual, 32, layers, 2]) for layers in (1, 2, 4, 8))
        assert 0.35 < two - one < 0.75
        assert max(deeper) < two + 0.2
        few, many = (fmean(thresholds[residual, 32, 4, heads]) for heads in (1, 8))
        assert 0.5 < many - few < 1.1


def test_the_sink_as_a_way_to_do_nothing_and_as_a_bias():
    record = BenchmarkRecord.load(RESULTS / "null_law_decoders" / "record.json")
    shares = {}
    for row in record.tables["arms"]:
        if "4 layers" in row["group"] and "key_value_null" not in row["group"]:
            weak = "weak" if row["null_logit"] in (None, 0) else "strong"
            value, removed, error = (row[name][1] for name in ("valueless", "removed", "error"))
            shares[row["group"], weak] = value / removed, value / error
    weak = {group: each for (group, null), each in shares.items() if null == "weak"}
    assert min(value for _, value in weak.values()) > 1
    assert max(share for group, (share, _) in weak.items() if group[:3] == "sum") < 0.0105
    bare = "depth, length 32, 4 layers, no final norm"
    with_value = "depth, length 32, 4 layers, value_null, no final norm"
    assert 0.6 < weak.pop(bare)[0] < 0.7
    assert 0.3 < weak.pop(with_value)[0] < 0.35
    routed = [share for group, (share, _) in weak.items() if group[:5] == "depth"]
    assert [min(routed), max(routed)] == pytest.approx([0.007, 0.066], abs=0.002)
    left = {row["group"]: row for row in record.tables["arms"] if row["null_logit"] == 5.5}
    assert left[bare]["valueless"][2] < 1e-5
    assert left[bare]["sink"][1] == pytest.approx(0.0083, abs=0.0002)
    assert shares["depth, length 32, 4 layers", "strong"][0] > 0.75


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
    assert max(errors["softmax1, 5, 2,000 steps"]) < min(errors["vanilla"])
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
