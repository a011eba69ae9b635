"""A figure of how a probability falls with the null logit, and of its thresholds by length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from oasis_attn.report.figures import _STYLE, MUTED, _set_title

_COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#888888")
Points = Sequence[tuple[float, float]]


def threshold_figure(
    curves: Mapping[str, Points],
    thresholds: Mapping[float, Points],
    lines: Mapping[float, tuple[float, float]],
) -> Figure:
    """Left: first-token probability by null logit.  Right: thresholds by length.

    Args:
        curves: label -> (null logit, probability), one point per run.
        thresholds: probability -> (length, threshold), one point per seed.
        lines: probability -> intercept and slope of the threshold in log(length).
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (name, points), color in zip(curves.items(), _COLORS, strict=False):
            logits = sorted({logit for logit, _ in points})
            medians = [float(np.median([p for c, p in points if c == logit])) for logit in logits]
            left.plot(logits, medians, color=color, label=name)
            left.plot(*zip(*points, strict=True), ".", color=color)
        _set_title(left, "Attention on the first token at idle queries", "mean probability")
        left.set(xlabel="null logit", ylabel="probability")
        left.legend()
        for (level, points), color in zip(thresholds.items(), _COLORS[::4], strict=False):
            lengths = np.array(sorted({length for length, _ in points}))
            intercept, slope = lines[level]
            label = f"probability {level:g}: {intercept:.2f} + {slope:.2f} log(length)"
            right.plot(lengths, intercept + slope * np.log(lengths), color=color, label=label)
            right.plot(*zip(*points, strict=True), ".", color=color)
        lengths = np.array(sorted({length for each in thresholds.values() for length, _ in each}))
        dashed = (0, (4, 3))
        right.plot(
            lengths,
            np.log(lengths),
            color=MUTED,
            linestyle=dashed,
            linewidth=1,
            label="log(length)",
        )
        right.set_xscale("log", base=2)
        right.set_xticks(lengths, labels=[str(int(length)) for length in lengths])
        right.xaxis.set_minor_locator(NullLocator())
        right.set_ylim(0, math.ceil(right.get_ylim()[1]) + 1)
        _set_title(
            right,
            "Threshold of the null logit",
            "per seed, and lines fitted to the shorter lengths",
        )
        right.set(xlabel="length", ylabel="null logit")
        right.legend(loc="lower right")
    return figure
