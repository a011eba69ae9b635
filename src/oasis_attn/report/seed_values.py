"""A figure of metrics by variant, with one dot per seed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, geometric_mean

import matplotlib
from matplotlib.figure import Figure

from oasis_attn.report.figures import _STYLE, INK, MUTED, _set_title


def seed_values_figure(
    panels: Mapping[str, Mapping[str, Sequence[float]]], logarithmic: Collection[str] = ()
) -> Figure:
    """One panel per metric and one row per variant: a light dot per seed, and their mean.

    The mean is geometric in panels with a logarithmic axis.

    Args:
        panels: title of the panel -> variant -> values; all panels have the same variants.
        logarithmic: titles of the panels whose axis is logarithmic.
    """
    variants = list(next(iter(panels.values())))
    with matplotlib.rc_context(_STYLE):
        size = (1.8 + 2.8 * len(panels), 0.8 + 0.19 * len(variants))
        figure = Figure(figsize=size, layout="constrained")
        axes_P = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, values) in zip(axes_P, panels.items(), strict=True):
            mean = geometric_mean if title in logarithmic else fmean
            for row, found in enumerate(values.values()):
                axes.plot(found, [row] * len(found), ".", color=MUTED, alpha=0.45)
                if found:
                    axes.plot([mean(found)], [row], "o", color=INK)
            if title in logarithmic:
                axes.set_xscale("log")
            _set_title(axes, title, "one light dot per seed, and the mean")
        axes_P[0].set_yticks(range(len(variants)), labels=variants)
        axes_P[0].set_ylim(len(variants) - 0.5, -0.5)
    return figure
