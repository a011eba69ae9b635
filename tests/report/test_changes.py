from __future__ import annotations

import math

import pytest

from oasis_attn.report import Table
from oasis_attn.report.changes import BETTER, WORSE, Change, change_figure
from oasis_attn.report.figures import BAD, GOOD, INK, svg
from oasis_attn.report.markdown import markdown
from oasis_attn.report.seed_values import seed_values_figure


def made(**values) -> Change:
    known = {
        "panel": "p", "label": "l", "n": 3, "change": -0.1, "low": -0.2, "high": 0.1,
        "noise_floor": 0.05, "ratio": False, "outcome": "",
    }  # fmt: skip
    return Change(**known | values)


def lines_of(axes):
    return [list(line.get_xdata()) for line in axes.lines]


def test_markdown_aligns_words_and_numbers_and_escapes():
    table = Table(title="T", columns=("a", "b"), rows=(("x|y", "1"), ("two\nlines", "2")))
    assert markdown(table) == (
        "### T\n\n| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n| two lines | 2 |\n"
    )
    assert markdown(Table(columns=("a",), rows=())) == "| a |\n| --- |\n"


def test_one_panel_per_metric_with_dot_interval_n_and_noise_floor():
    changes = [
        made(panel=panel, label=label)
        for panel in ("norm", "kurtosis", "loss", "mass")
        for label in ("vanilla", "gated")
    ]
    figure = change_figure(changes, title="oasis")
    drawn = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in drawn] == ["norm", "kurtosis", "loss", "mass"]
    axes = drawn[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["vanilla", "gated"]
    assert [pytest.approx(-15.0), 10.0] in lines_of(axes)  # the interval ends where the axis does
    assert [-10.0] in lines_of(axes)
    assert len(axes.patches) == 2  # one for each change
    assert [text.get_text() for text in axes.texts].count("3") == 2


def test_no_floor_no_band():
    change = made(change=1.0, low=math.nan, high=math.nan, noise_floor=math.nan)
    (axes,) = change_figure([change], title="t").axes
    assert len(axes.patches) == 0


def test_significant_changes_are_filled_and_colored():
    outcomes = {"": INK, BETTER: GOOD, WORSE: BAD}
    figure = change_figure([made(label=name, outcome=name) for name in outcomes], title="t")
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [dot.get_color() for dot in dots] == [*outcomes.values()]
    assert [dot.get_markerfacecolor() == "none" for dot in dots] == [True, False, False]
    text = svg(figure)
    assert "var(--good)" in text
    assert GOOD not in text


@pytest.mark.parametrize("ratio", [False, True])
def test_an_outlier_is_clipped_with_a_mark_and_does_not_flatten_the_others(ratio):
    small = [made(label=str(i), change=0.02 * i, ratio=ratio) for i in range(-3, 4)]
    far = made(label="far", change=80.0, low=60.0, high=90.0, ratio=ratio)
    (axes,) = change_figure([*small, far], title="t").axes
    low, high = axes.get_xlim()
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert len(dots) == 7
    assert dots[-1].get_xdata()[0] > high / 4
    (mark,) = [line for line in axes.lines if line.get_marker() == ">"]
    assert low < mark.get_xdata()[0] < high
    assert "x 81" in [text.get_text() for text in axes.texts]


def test_ratios_that_differ_widely_have_a_logarithmic_axis():
    changes = [
        made(label=str(x), change=x - 1, low=x - 1, high=x - 1, ratio=True) for x in (0.1, 10)
    ]
    (axes,) = change_figure(changes, title="t").axes
    dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert dots[0] == pytest.approx(-dots[1])
    assert "x 1" in [tick.get_text() for tick in axes.get_xticklabels()]


def test_titles_wrap_and_long_labels_have_space():
    title = "a metric with a very long name that does not fit into one line"
    (axes,) = change_figure([made(panel=title, label="variant_" * 8)], title="t").axes
    assert "\n" in axes.get_title(loc="left")
    figure = axes.get_figure()
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    assert box.x0 >= 0
    assert box.x1 <= figure.get_size_inches()[0]


def test_a_dot_per_seed_and_the_mean():
    panels = {"sink": {"a": [0.1, 0.3], "b": []}, "error": {"a": [1e-5, 1e-4], "b": [1.0]}}
    sink, error = seed_values_figure(panels, logarithmic=["error"]).axes
    assert [text.get_text() for text in sink.get_yticklabels()] == ["a", "b"]
    drawn = [list(line.get_xdata()) for line in sink.lines]
    assert drawn == [[0.1, 0.3], [pytest.approx(0.2)], []]
    assert (sink.get_xscale(), error.get_xscale()) == ("linear", "log")
