"""A figure of relative changes with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

from oasis_attn.report.figures import _STYLE, INK, MUTED, _set_title


@dataclass(frozen=True, kw_only=True)
class Change:
    """One line of the figure.  All numbers are relative: 0.1 is 10 % more.

    Attributes:
        panel: title of the panel; panels are in the order of their first line.
        label: label of the line.
        change, low, high: the change and its interval.
        noise_floor: the absolute change that a different seed alone causes.
    """

    panel: str
    label: str
    change: float
    low: float
    high: float
    noise_floor: float


def change_figure(changes: Sequence[Change], *, title: str, columns: int = 3) -> Figure:
    """One panel per metric: each change is a dot with its interval; a gray band is the noise floor.

    Changes that are not finite are not drawn.
    """
    panels: dict[str, list[Change]] = {}
    for change in changes:
        panels.setdefault(change.panel, []).append(change)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    tallest = max(map(len, panels.values()))
    with matplotlib.rc_context(_STYLE):
        size = (4.1 * columns, rows * (1.1 + 0.24 * tallest))
        figure = Figure(figsize=size, layout="constrained")
        axes_RC = figure.subplots(rows, columns, squeeze=False)
        for axes in axes_RC.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (panel, lines) in zip(axes_RC.flat, panels.items(), strict=False):
            floor = 100 * lines[0].noise_floor
            if floor < float("inf"):
                axes.axvspan(-floor, floor, color=MUTED, alpha=0.18, linewidth=0)
            axes.axvline(0, color=MUTED, linewidth=1)
            for row, line in enumerate(lines):
                axes.plot([100 * line.low, 100 * line.high], [row, row], color=INK, linewidth=1.6)
                axes.plot([100 * line.change], [row], color=INK, marker="o", markersize=5)
            axes.set_yticks(range(len(lines)), labels=[line.label for line in lines])
            axes.set_ylim(len(lines) - 0.5, -0.5)
            axes.grid(axis="y", visible=False)
            _set_title(axes, panel, f"{title}, change in %")
    return figure
