"""Pages of records: what they say, and what they show of each kind."""

from __future__ import annotations

from dataclasses import replace

import pytest

from example_records import diagnosis, model_info, quantization
from oasis_attn.errors import UserError
from oasis_attn.records import BenchmarkRecord, Metric
from oasis_attn.report.conclusion import conclusion
from oasis_attn.report.document import Picture, walk
from oasis_attn.report.record_findings import findings
from oasis_attn.report.record_page import answers, named, record_sections, title
from oasis_attn.report.tables import Table
from oasis_attn.report.values import _shortened
from test_records import EXAMPLES


def values(**found: float):
    return tuple(Metric(name=name, value=value) for name, value in found.items())


def sections(records):
    return record_sections(records, dict.fromkeys(records, "path.json"))


def shown(records, kind):
    return {item.title: item for item in walk(sections(named(records))) if isinstance(item, kind)}


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: record.kind)
def test_every_kind_has_a_page_with_all_its_numbers_settings_and_arrays(record):
    records = named({"r.json": record})
    assert title(records).startswith(record.kind.capitalize())
    assert findings(records)
    tables = shown({"r.json": record}, Table)
    (metrics,) = (table for name, table in tables.items() if name.startswith("Metrics"))
    assert metrics.rows == (("b", "c", "-", "1 ± 0.5"),)
    assert dict(tables["Settings"].rows)["kind"] == record.kind
    (arrays,) = (table for name, table in tables.items() if name.endswith(": loss"))
    assert arrays.rows == (("1", "2"),)
    assert "Training loss by step" in shown({"r.json": record}, Picture)


def test_all_kinds_side_by_side():
    records = {f"{record.kind}.json": record for record in EXAMPLES}
    assert len(named(records)) == len(EXAMPLES)
    assert shown(records, Table)["Metrics by place"].columns[3:] == tuple(named(records))
    assert "Settings that differ" in shown(records, Table)


def test_labels_are_short_and_different():
    a, b = diagnosis("m"), diagnosis("n")
    assert list(named({"x.json": a, "y.json": b})) == ["m", "n"]
    assert list(named({"x.json": a, "y.json": quantization("m")})) == [
        "m, diagnosis",
        "m, quantization",
    ]
    assert list(named({"d/x.json": a, "d/y.json": a})) == ["m (x.json)", "m (y.json)"]
    assert list(named({"d/x.json": a, "e/x.json": a})) == ["m (d/x.json)", "m (e/x.json)"]


def test_records_side_by_side_say_which_is_best():
    records = {
        name: diagnosis(name, metrics=values(**{"perplexity.windowed": p, "sink.mass": 0.5}))
        for name, p in (("a", 9.0), ("b", 8.0))
    }
    first, second = findings(records)
    assert first == "Of 2 records, `b` has the best `perplexity.windowed`, 8, and `a` the worst, 9."
    assert second == "`sink.mass` is 0.5 in all 2 records that have it."
    assert "perplexity.windowed by record" in shown(records, Picture)
    assert findings({"a": diagnosis("a"), "b": diagnosis("b")}) == [
        "The 2 records have no metric in common."
    ]


def test_before_and_after():
    metrics = [
        Metric(name="perplexity.windowed", value=v, where=w)
        for w, v in (("before", 20.0), ("after", 30.0))
    ]
    records = {"q.json": quantization("m", metrics=tuple(metrics))}
    assert findings(named(records)) == ["`perplexity.windowed` is 20 before and 30 after (+50.0%)."]
    table = shown(records, Table)["Before and after"]
    assert table.rows == (("m", "perplexity.windowed", "20", "30", "+50.00%", "lower"),)
    assert "Metrics" not in shown(records, Table)


def test_a_diagnosis_names_token_and_channel():
    row = {"layer": 3, "position": 0, "channel": 7, "token": 1, "text": "The", "largest": "inf"}
    sink = {"text": "The", "token": 1, "position": 0, "received": 0.6, "heads": 2.0,
            "layers": [0, 1, 2], "windows": 4}  # fmt: skip
    tables = {
        "outlier.largest": [row],
        "outlier.massive": [row],
        "sink.tokens": [sink],
        "sink.mass": [[0.1, 0.9]],
        "outlier.inf_norm_layer": [1.0],
        "outlier.kurtosis_layer": ["nan"],
    }
    records = named({"d.json": diagnosis("m", tables=tables)})
    said = " ".join(findings(records))
    assert "'The' at position 0, in the layers 0-2" in said
    assert "The largest activation is inf, in channel 7 of 'The' at position 0, in layer 3" in said
    assert {"m: By layer", "m: Massive activations of layer outputs"} <= set(
        shown({"d.json": diagnosis("m", tables=tables)}, Table)
    )
    pictures = shown({"d.json": diagnosis("m", tables=tables)}, Picture)
    assert "Attention on the first token: m" in pictures
    assert "Largest value and kurtosis of each layer's output" in pictures


def test_a_benchmark_names_the_best_place():
    metrics = tuple(
        Metric(name="perplexity.windowed", value=value, where=where, standard_error=0.1)
        for where, value in (("w8", 30.0), ("w4", 90.0))
    )
    records = {"b.json": BenchmarkRecord(name="speed", metrics=metrics)}
    (said,) = findings(named(records))
    assert said == (
        "Of 2 values of `perplexity.windowed`, the best is that of w8, 30, and the worst that of "
        "w4, 90."
    )
    assert "perplexity.windowed by record" in shown(records, Picture)


def test_an_evaluation_shows_intervals():
    (example,) = (record for record in EXAMPLES if record.kind == "evaluation")
    record = replace(
        example, metrics=values(**{"arith.pass@1.strict": 0.5}),
        intervals={"arith.pass@1.strict": (0.4, 0.6)}, model=model_info("e"),
    )  # fmt: skip
    said = findings(named({"e.json": record}))
    assert "0.5 (95 % interval 0.4 to 0.6)" in said[-1]


@pytest.mark.parametrize(
    "tables",
    [
        {"loss": [{"step": 1}]},
        {"loss": 3},
        {"sink.mass": [["a"]]},
        {"sink.mass": []},
        {"outlier.inf_norm_layer": [[1], [2, 3]], "outlier.kurtosis_layer": [1]},
        {"sink.tokens": [{"text": "a"}]},
        {"outlier.largest": [{}], "outlier.massive": []},
    ],
)
def test_an_array_of_another_form_is_refused_by_path(tables):
    records = named({"path.json": diagnosis("m", tables=tables)})
    with pytest.raises(UserError, match=r"record: 'path.json' has an array of an unexpected form"):
        sections(records)


def test_a_diagnosis_begins_with_its_conclusion():
    noise = {f"range.noise_{kind}": 2.0 for kind in ("static", "static_rest", "dynamic")}
    record = diagnosis("m", metrics=values(**noise), tables={"sink.tokens": []})
    said = findings({"m": record})
    assert said == [*conclusion(record), "No token is an attention sink."]
    assert said[0].startswith("Static per-tensor ranges of 8 bits will break")


def test_a_conclusion_from_an_array_of_another_form_is_refused_by_path():
    noise = {"range.noise_static": 2.0, "range.noise_static_rest": 0.0, "range.noise_dynamic": 0.0}
    for tables in ({}, {"range.outlier_tokens": [{}], "outlier.largest": []}):
        record = diagnosis("m", metrics=values(**noise), tables=tables)
        with pytest.raises(UserError, match=r"record: 'path.json' has an array of an unexpected"):
            answers({"m": record}, {"m": "path.json"})


def test_long_labels_keep_both_ends():
    assert _shortened("original / gsm8k / w8a8-static-full") == "original / gs...8-static-full"
    assert _shortened("original / gsm8k / w4a4") == "original / gsm8k / w4a4"
