from __future__ import annotations

import math

import pytest

from oasis_attn.report import Table
from oasis_attn.report.changes import Change, change_figure
from oasis_attn.report.markdown import markdown
from oasis_attn.report.seed_values import seed_values_figure


def test_markdown_aligns_words_and_numbers_and_escapes():
    table = Table(title="T", columns=("a", "b"), rows=(("x|y", "1"), ("two\nlines", "2")))
    assert markdown(table) == (
        "### T\n\n| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n| two lines | 2 |\n"
    )
    assert markdown(Table(columns=("a",), rows=())) == "| a |\n| --- |\n"


def test_one_panel_per_metric_with_dot_interval_and_noise_floor():
    changes = [
        Change(panel=panel, label=label, change=-0.1, low=-0.2, high=0.1, noise_floor=0.05)
        for panel in ("norm", "kurtosis", "loss", "mass")
        for label in ("vanilla", "gated")
    ]
    figure = change_figure(changes, title="oasis")
    drawn = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in drawn] == ["norm", "kurtosis", "loss", "mass"]
    axes = drawn[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["vanilla", "gated"]
    lines = [list(line.get_xdata()) for line in axes.lines]
    assert [-20.0, 10.0] in lines
    assert [-10.0] in lines
    assert len(axes.patches) == 1


def test_no_floor_no_band():
    change = Change(
        panel="p", label="l", change=1.0, low=math.nan, high=math.nan, noise_floor=math.nan
    )
    (axes,) = change_figure([change], title="t").axes
    assert len(axes.patches) == 0


def test_a_dot_per_seed_and_the_mean():
    panels = {"sink": {"a": [0.1, 0.3], "b": []}, "error": {"a": [1e-5, 1e-4], "b": [1.0]}}
    sink, error = seed_values_figure(panels, logarithmic=["error"]).axes
    assert [text.get_text() for text in sink.get_yticklabels()] == ["a", "b"]
    drawn = [list(line.get_xdata()) for line in sink.lines]
    assert drawn == [[0.1, 0.3], [pytest.approx(0.2)], []]
    assert (sink.get_xscale(), error.get_xscale()) == ("linear", "log")
