"""Figures of values: one dot for each record or place, and lines over the steps of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from oasis_attn.report.figures import (
    _BOLD_LETTER,
    _STYLE,
    INK,
    _log_scale,
    _set_title,
    colors,
)
from oasis_attn.report.tables import number

_LETTER = 5.4  # points of a letter of a label
_LONGEST = 30  # letters of a label
_LOGARITHMIC = 30  # ratio of the largest to the smallest value from which on an axis is logarithmic


@dataclass(frozen=True, kw_only=True)
class Value:
    """One dot: its label, its value, and the ends of its interval (NaN if it has none)."""

    label: str
    value: float
    low: float = math.nan
    high: float = math.nan


def value_figure(values: Sequence[Value], *, title: str, subtitle: str) -> Figure:
    """A dot for each value, with its number; the axis is logarithmic if values differ widely."""
    finite = [each.value for each in values if math.isfinite(each.value)]
    with matplotlib.rc_context(_STYLE):
        labels = [_shortened(each.label) for each in values]
        margin = _LETTER * max(map(len, labels)) + 60
        width = max(4.2, (margin + max(150, _BOLD_LETTER * len(title))) / 72)
        height = 1.15 + 0.22 * max(len(values), 2)
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        for row, each in enumerate(values):
            if math.isfinite(each.low) and math.isfinite(each.high):
                axes.plot([each.low, each.high], [row, row], color=INK, linewidth=1.4)
            if math.isfinite(each.value):
                axes.plot([each.value], [row], "o", color=INK, markersize=5)
            axes.annotate(
                number(each.value), (1, row), (6, 0), xycoords=("axes fraction", "data"),
                va="center", textcoords="offset points", fontsize=8.5, annotation_clip=False,
            )  # fmt: skip
        axes.set_yticks(range(len(values)), labels=labels)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        if finite and min(finite) > 0 and max(finite) > _LOGARITHMIC * min(finite):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=4))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
        axes.xaxis.set_major_formatter(lambda x, _: number(x))
        axes.margins(x=0.12)
        _set_title(axes, title, subtitle, margin=margin)
    return figure


def loss_lines(losses: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """The training loss of each record by step.

    Args:
        losses: label -> (step, loss).
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        for (name, points), color in zip(losses.items(), colors(losses), strict=True):
            axes.plot(*zip(*points, strict=True), color=color, label=_shortened(name))
        found = [loss for points in losses.values() for _, loss in points if math.isfinite(loss)]
        if found and min(found) > 0 and max(found) > _LOGARITHMIC * min(found):
            _log_scale(axes)
        _set_title(axes, "Training loss", "table loss of each record")
        axes.set(xlabel="step", ylabel="loss")
        if len(losses) > 1:
            axes.legend()
    return figure


def _shortened(label: str) -> str:
    """The label without its middle, because labels differ at their ends."""
    if len(label) <= _LONGEST:
        return label
    kept = (_LONGEST - 3) // 2
    return f"{label[:kept]}...{label[-kept:]}"
