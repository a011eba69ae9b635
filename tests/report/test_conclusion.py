from __future__ import annotations

from dataclasses import replace

import pytest

from example_records import diagnosis
from oasis_attn.quantization.schemes import schemes
from oasis_attn.records import DiagnosisRecord, Metric
from oasis_attn.report import conclusion, head_table
from oasis_attn.report.conclusion import Noise, scheme_breaks


def record(static: float, rest: float, dynamic: float, tokens: int = 1) -> DiagnosisRecord:
    values = {
        "range.noise_static": static,
        "range.noise_static_rest": rest,
        "range.noise_dynamic": dynamic,
        "range.outlier_tokens": float(tokens),
        "sink.idle_heads": 2.0,
        "sink.silent_heads": 1.0,
    }
    row = {"token": 7, "text": "a", "windows": 2, "ratio": 1234.5, "layers": [1, 2, 5]}
    tables = {
        "range.outlier_tokens": [row | {"position": position} for position in range(tokens)],
        "outlier.largest": [
            {"layer": 0, "channel": 1, "token": 7, "position": 3, "largest": 9.0},
            {"layer": 1, "channel": 2, "token": 7, "position": 0, "largest": -5000.0},
            {"layer": 2, "channel": 4, "token": 7, "position": 0, "largest": 60.0},
        ],
        "sink.mass": [[0.6, 0.1], [0.6, 0.1]],
        "sink.idle_heads": [[0, 0], [1, 0]],
        "sink.silent_heads": [[1, 1]],
    }
    metrics = tuple(Metric(name=name, value=value) for name, value in values.items())
    return diagnosis(metrics=metrics, tables=tables)


ONE = (
    "One token carries the outliers: 'a' at position 0 reaches -5,000 in channel 2, and up to 1,234"
    " times the median token, in layers 1-2, 5."
)
BREAKS = (
    "Static per-tensor ranges of 8 bits will break: their rounding error is 200 % of the power of a"
    " median token."
)


@pytest.mark.parametrize(
    ("noises", "expected"),
    [
        (
            (0.1, 0.02, 0.01),
            [
                "No outlier breaks ranges of 8 bits.",
                (
                    "Static per-tensor ranges of 8 bits will hold: their rounding error is 10 % of"
                    " the power of a median token (dynamic per-token ranges: 1 %)."
                ),
            ],
        ),
        (
            (2.0, 0.0123, 0.00051),
            [
                ONE,
                BREAKS,
                (
                    "Dynamic per-token ranges (0.051 %) or a prefix that takes over from the"
                    " outlier tokens (1.2 %) will not."
                ),
            ],
        ),
        (
            (2.0, 0.5, 0.01),
            [
                BREAKS,
                "Dynamic per-token ranges (1 %) will not.",
                "A prefix that takes over from the outlier tokens (50 %) will break too.",
            ],
        ),
        (
            (2.0, 0.05, 0.5),
            [
                ONE,
                BREAKS,
                "A prefix that takes over from the outlier tokens (5 %) will not.",
                "Dynamic per-token ranges (50 %) will break too.",
            ],
        ),
        (
            (2.0, 0.5, 0.5),
            [
                BREAKS,
                (
                    "Dynamic per-token ranges (50 %) and a prefix that takes over from the outlier"
                    " tokens (50 %) will break too."
                ),
                "Channels carry the outliers: try SmoothQuant or a rotation.",
            ],
        ),
        ((float("nan"),) * 3, ["Some values are not finite, so no range covers them."]),
    ],
)
def test_what_is_said_follows_the_rules(noises, expected) -> None:
    assert list(conclusion(record(*noises)))[: len(expected)] == expected


def test_several_tokens_are_counted_and_the_worst_is_named() -> None:
    first = conclusion(record(2.0, 0.01, 0.01, tokens=3))[0]
    assert first.startswith("A few tokens carry the outliers, 3 in a window. The worst: 'a' at")


def test_the_largest_activations_may_be_those_of_another_token() -> None:
    found = record(2.0, 0.01, 0.01)
    for row in found.tables["outlier.largest"][1:]:
        row["token"] = 8
    assert conclusion(found)[0] == (
        "One token carries the outliers: 'a' at position 0 reaches up to 1,234 times the median"
        " token, in layers 1-2, 5."
    )


def test_heads_are_counted_and_listed() -> None:
    found = record(0.0, 0.0, 0.0)
    assert conclusion(found)[-2:] == (
        "Idle heads: 2 of 4; more than half of their attention goes to the first position.",
        "Silent heads: 1; they write less than a tenth of what others do.",
    )
    assert head_table(found).rows == (("0", "0", "-"), ("1", "0", "1"))


def test_noise_grows_with_the_square_of_the_step() -> None:
    eight, four = (Noise.of(record(0.02, 0.01, 0.0), steps) for steps in (255, 15))
    assert four.static == pytest.approx(0.02 * 17**2)
    assert not eight.breaks["static"]
    assert four.breaks == {"static": True, "rest": True, "dynamic": False}


def test_what_breaks_depends_on_the_numbers_of_the_scheme() -> None:
    """FP8 has small steps around zero, and of groups a diagnosis says nothing."""
    found, table = record(1000.0, 0.05, 0.01), schemes()
    broken = {
        name: [kind for kind, breaks in scheme_breaks(found, scheme).items() if breaks]
        for name, scheme in table.items()
    }
    assert broken["w8a8-static-linear"] == ["static"]
    assert broken["w4a4"] == ["static", "rest", "dynamic"]
    for name in ("fp8-static", "fp8-dynamic", "mxfp8", "mxfp4", "nvfp4", "w4a16"):
        assert broken[name] == []
    float4 = table["nvfp4"].weight.per_tensor()
    assert float4.steps == 24
    per_token = replace(table["nvfp4"], activation=float4)
    assert scheme_breaks(found, per_token)["dynamic"]
