"""Figures of relative changes with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from oasis_attn.report.figures import _STYLE, BAD, GOOD, INK, MUTED, _set_title

READING = (
    "A dot is a change, and its line the interval. Changes that are significant and larger than "
    "the noise floor are filled: green is better, red is worse. The gray band is the noise floor. "
    "A triangle at the edge is a change beyond it, with its value. The numbers at the right are n."
)
"""How to read these figures."""

BETTER, WORSE = "better", "worse"
_COLORS = {BETTER: GOOD, WORSE: BAD}
_LETTER = 5.4  # points of a letter of a label
_BEYOND = 4.0  # a change this many times as large as most others is clipped
_FACTOR = 2.0  # from this ratio on, the axis of a ratio is logarithmic
_LADDERS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))  # ticks between powers of 10


@dataclass(frozen=True, kw_only=True)
class Change:
    """One line of a figure.  All numbers are relative: 0.1 is 10 % more.

    Attributes:
        panel: title of the panel; panels are in the order of their first line.
        label: label of the line.
        n: number of pairs.
        change, low, high: the change and its interval.
        noise_floor: the absolute change that a different seed alone causes.
        ratio: whether the metric varies in proportion, so that its axis may be logarithmic.
        outcome: `BETTER` or `WORSE` if the change is significant; empty if it is not.
    """

    panel: str
    label: str
    n: int
    change: float
    low: float
    high: float
    noise_floor: float
    ratio: bool
    outcome: str


def change_figure(changes: Sequence[Change], *, title: str, columns: int = 2) -> Figure:
    """One panel per metric: each change is a dot with its interval; see `READING`.

    Changes that are not finite are not drawn.

    Args:
        title: what the changes are of, below the title of each panel.
    """
    panels: dict[str, list[Change]] = {}
    for change in changes:
        panels.setdefault(change.panel, []).append(change)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    tallest = max(map(len, panels.values()))
    with matplotlib.rc_context(_STYLE):
        labels = _LETTER * max(len(each.label) for each in changes) + 30
        size = (columns * max(4.2, (labels + 150) / 72), rows * (1.25 + 0.2 * max(tallest, 2)))
        figure = Figure(figsize=size, layout="constrained")
        engine: Any = figure.get_layout_engine()
        engine.set(w_pad=0.12, h_pad=0.08)
        axes_RC = figure.subplots(rows, columns, squeeze=False)
        for axes in axes_RC.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (panel, lines) in zip(axes_RC.flat, panels.items(), strict=False):
            _draw(axes, lines)
            _set_title(axes, panel, title, margin=labels)
    return figure


def _draw(axes: Axes, lines: Sequence[Change]) -> None:
    low, high = _ends(lines)
    logarithmic = all(line.ratio for line in lines) and max(1 / (1 + low), 1 + high) > _FACTOR
    place = _log2 if logarithmic else _percent
    axes.axvline(0, color=MUTED, linewidth=1)
    for row, line in enumerate(lines):
        floor = line.noise_floor
        if floor < math.inf:
            left, right = map(place, (1 / (1 + floor) - 1 if line.ratio else -floor, floor))
            axes.barh(row, right - left, 1, left, color=MUTED, alpha=0.18, linewidth=0)
        _draw_line(axes, row, line, place, (low, high))
    axes.set_yticks(range(len(lines)), labels=[line.label for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    pad = 0.05 * (place(high) - place(low))
    axes.set_xlim(place(low) - pad, place(high) + pad)
    if logarithmic:
        axes.set_xticks(*_factors(low, high))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g} %" if x else "0"))


def _draw_line(
    axes: Axes,
    row: int,
    line: Change,
    place: Callable[[float], float],
    ends: tuple[float, float],
) -> None:
    color = _COLORS.get(line.outcome, INK)
    fill = color if line.outcome else "none"
    low, high = ends
    if math.isfinite(line.low) and math.isfinite(line.high):
        interval = [place(min(max(end, low), high)) for end in (line.low, line.high)]
        axes.plot(interval, [row, row], color=color, linewidth=1.4)
    if low <= line.change <= high:
        axes.plot([place(line.change)], [row], "o", color=color, markerfacecolor=fill, markersize=5)
    elif math.isfinite(line.change):
        above = line.change > 0
        edge, marker = (high, ">") if above else (low, "<")
        axes.plot([place(edge)], [row], marker, color=color, markerfacecolor=fill, markersize=5)
        axes.annotate(
            _amount(line.change), (place(edge), row), (-6 if above else 6, 0), va="center",
            textcoords="offset points", ha="right" if above else "left", color=color, fontsize=8.5,
        )  # fmt: skip
    axes.annotate(
        str(line.n), (1, row), (6, 0), xycoords=("axes fraction", "data"), va="center",
        textcoords="offset points", color=MUTED, fontsize=8.5, annotation_clip=False,
    )  # fmt: skip


def _ends(lines: Sequence[Change]) -> tuple[float, float]:
    """The ends of the axis: they include 0, and clip a few changes far beyond the others.

    Sizes are compared as logarithms of ratios if the metric varies in proportion.
    """
    ratio = all(line.ratio for line in lines)
    to, back = (_log1p, math.expm1) if ratio else (float, float)
    sizes = sorted(abs(to(line.change)) for line in lines if math.isfinite(line.change)) or [0.0]
    most, largest = sizes[int(0.85 * (len(sizes) - 1))], sizes[-1]
    clipped = len(sizes) > 2 and largest > _BEYOND * most > 0
    limit = max(1.5 * most if clipped else 1.5 * largest, 0.005)
    drawn = [x for line in lines for x in (line.change, line.low, line.high) if math.isfinite(x)]
    least = limit / 5  # of the axis on each side of 0
    low = max(-limit, min([-least, *map(to, drawn)]))
    high = min(limit, max([least, *map(to, drawn)]))
    return max(back(low), -1.0), back(high)


def _log1p(change: float) -> float:
    return math.log(max(1 + change, 1e-9))


def _percent(change: float) -> float:
    return 100 * change


def _log2(change: float) -> float:
    return _log1p(change) / math.log(2)


def _amount(change: float) -> str:
    return f"{100 * change:+.0f} %" if change < 9 else f"x {1 + change:.3g}"


def _factors(low: float, high: float) -> tuple[list[float], list[str]]:
    """Ticks of a logarithmic axis: the coarsest ladder of factors with at least three."""
    powers = range(math.floor(math.log10(1 + low)), math.ceil(math.log10(1 + high)) + 1)
    factors: list[float] = []
    for digits in _LADDERS:
        found = (digit * 10.0**power for power in powers for digit in digits)
        factors = [factor for factor in found if low <= factor - 1 <= high]
        if len(factors) >= 3:
            break
    return [_log2(factor - 1) for factor in factors], [f"x {factor:g}" for factor in factors]
