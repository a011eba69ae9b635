from __future__ import annotations

from dataclasses import replace

import pytest

from example_records import diagnosis
from oasis_attn.records import DiagnosisRecord, Metric
from oasis_attn.report import (
    activation_table,
    layer_table,
    number,
    sink_table,
    summary_table,
    variants_table,
)


def record(**values: float) -> DiagnosisRecord:
    metrics = tuple(Metric(name=name, value=value) for name, value in values.items())
    elsewhere = Metric(name="loss", value=99.0, where="layers.0")
    return diagnosis("folder/model", metrics=(*metrics, elsewhere))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (3.14159, "3.142"),
        (-0.00012346, "-0.0001235"),
        (999.96, "1000"),
        (22552.4, "22,552"),
        (1.5e9, "1.5e+09"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_activations_are_named_by_token_and_channel() -> None:
    token = {"token": 7, "position": 0}
    massive = [
        {"layer": layer, "channel": 3, "text": "a\n", "largest": value} | token
        for layer, value in ((1, 200.0), (2, -300.0), (4, 250.0))
    ]
    small = {"layer": 0, "channel": 5, "largest": 20.0, "text": "x" * 40} | token
    tables = {"outlier.massive": massive, "outlier.largest": [small]}
    table = activation_table(diagnosis(tables=tables))
    assert table.rows == (("'a\\n'", "0", "3", "-300", "2", "1-2, 4"),)
    table = activation_table(diagnosis(tables=tables | {"outlier.massive": []}))
    assert "none is massive" in table.title
    assert table.rows == ((f"'{'x' * 19}...'", "0", "5", "20", "0", "0"),)


def test_a_token_without_text_is_named_by_its_id() -> None:
    row = {"token": 7, "position": 0, "received": 0.5, "heads": 3.0, "layers": [2], "windows": 4}
    table = sink_table(diagnosis(tables={"sink.tokens": [row]}))
    assert table.rows == (("id 7", "0", "0.5", "3", "2", "4"),)


def test_variants_table_shows_what_differs_from_the_first() -> None:
    vanilla = {"residual": "sum", "null_signal": "off"}
    table = variants_table({"vanilla": vanilla, "depth": vanilla | {"residual": "depth", "x": 4}})
    assert table.columns == ("variant", "settings that differ from vanilla")
    assert table.rows == (("vanilla", ""), ("depth", "residual=depth x=4"))


def test_tables_of_a_record_have_a_row_per_metric_and_per_layer() -> None:
    tables = {
        "outlier.inf_norm_layer": [1.0, "inf"],
        "outlier.kurtosis_layer": [3.0, 4.0],
        "sink.mass": [[0.0, 1.0], [0.25, 0.25]],
    }
    found = replace(record(loss=2.0), tables=tables)
    whole, layers = summary_table(found), layer_table(found)
    assert whole.title == "model"
    assert whole.rows == (("loss", "2", "-"),)
    assert layers.columns == ("layer", "max |h|", "kurtosis", "first-token mass")
    assert layers.rows == (("0", "1", "3", "0.5"), ("1", "inf", "4", "0.25"))


def test_the_kurtosis_of_the_literature_has_a_count_of_tensors_that_lower_it() -> None:
    def counted(silent: float, understated: float) -> DiagnosisRecord:
        return record(
            **{
                "outlier.avg_kurtosis": 2.0,
                "outlier.mean_pearson_kurtosis": 4.0,
                "outlier.silent_tensors": silent,
                "outlier.understated_kurtosis": understated,
            }
        )

    for counts, text in (
        ((0, 0), "2"), ((0, 2), "2 (2 understated)"), ((1, 3), "2 (1 silent, 3 understated)")
    ):  # fmt: skip
        shown = {row[0]: row[1] for row in summary_table(counted(*counts)).rows}
        assert shown["outlier.avg_kurtosis"] == text
        assert shown["outlier.mean_pearson_kurtosis"] == "4"
    (row,) = summary_table(record(**{"outlier.avg_kurtosis": 2.0})).rows
    assert row[1] == "2"


def test_layers_show_the_kurtosis_without_a_scale_too() -> None:
    tables = {
        "outlier.inf_norm_layer": [1.0],
        "outlier.kurtosis_layer": [0.2],
        "outlier.pearson_kurtosis_layer": ["nan"],
        "sink.mass": [[0.5]],
    }
    layers = layer_table(replace(record(loss=2.0), tables=tables))
    assert layers.columns == (
        "layer",
        "max |h|",
        "kurtosis",
        "Pearson kurtosis",
        "first-token mass",
    )
    assert layers.rows == (("0", "1", "0.2", "nan", "0.5"),)


def test_layers_without_an_attention_map_are_named() -> None:
    tables = {
        "outlier.inf_norm_layer": [1.0, 2.0],
        "outlier.kurtosis_layer": [3.0, 4.0],
        "sink.mass": [[0.5, 0.3], ["nan", "nan"]],
        "sink.no_map": [{"layer": 1, "module": "MambaMixer"}],
    }
    layers = layer_table(replace(record(loss=2.0), tables=tables))
    assert layers.title == "By layer; layers without an attention map: 1 (MambaMixer)"
    assert layers.rows == (("0", "1", "3", "0.4"), ("1", "2", "4", "nan"))
    del tables["sink.mass"]
    layers = layer_table(replace(record(loss=2.0), tables=tables))
    assert layers.columns == ("layer", "max |h|", "kurtosis")
