"""Figures from records, with matplotlib.

The title of a figure describes its content; the line below is the name of the table in the record.
Lines have the colors of Paul Tol's `bright` scheme, which color-blind readers can distinguish on
light and dark backgrounds.  Maps use viridis.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from oasis_attn.errors import UserError
from oasis_attn.files import write_bytes, write_text
from oasis_attn.records import DiagnosisRecord, ModelRecord
from oasis_attn.report.tables import label, number

INK, MUTED, RULE = "#24292f", "#68717b", "#d5dae0"
GOOD, BAD = "#1d7a33", "#b3260f"
VARIANT_COLORS = {"vanilla": "#4477aa", "attn_residual": "#ee6677", "oasis": "#228833"}
COLORS = ("#aa3377", "#66ccee", "#ccbb44", "#888888")
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "oasis",
}

_BOLD_LETTER = 7.6  # points of a letter of a title
_INF_NORM, _KURTOSIS = "outlier.inf_norm_layer", "outlier.kurtosis_layer"
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_PAGE_COLORS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    GOOD: "var(--good)",
    BAD: "var(--bad)",
}


@dataclass(frozen=True)
class _Map:
    """A heat map of a table: its file name, its title, and the names of its colors and axes."""

    file: str
    title: str
    color_label: str
    across: str = "head"
    down: str = "layer"


_ATTENTION, _NULL = "mean attention probability", "mean null probability"
_MAPS = {
    "sink.mass": _Map("first-token-mass", "Attention on the first token", _ATTENTION),
    "sink.idle": _Map(
        "first-token-idle", "Attention of idle tokens on the first token", _ATTENTION
    ),
    "sink.trigger": _Map(
        "first-token-trigger", "Attention of triggers on the first token", _ATTENTION
    ),
    "null.mass": _Map("null-mass", "Attention on the null option", _NULL),
    "null.idle": _Map("null-idle", "Attention of idle tokens on the null option", _NULL),
    "depth.weights": _Map(
        "depth-weights",
        "Weights of the depth routers",
        "mean weight",
        across="source (0 is the embedding)",
        down="router",
    ),
}


def record_maps(record: ModelRecord, name: str) -> dict[str, Figure]:
    """A map of each table of `_MAPS` that the record has, by file name.

    Layers x heads, except `depth.weights`, which is [router][source]: its rows differ in length,
    because a router reads only the outputs of previous sublayers.

    Args:
        name: name of the record in the titles.
    """
    return {
        each.file: _map(record.tables[table], f"{each.title}: {name}", table, each)
        for table, each in _MAPS.items()
        if table in record.tables
    }


def outlier_lines(records: Mapping[str, ModelRecord]) -> Figure:
    """Largest value and kurtosis of each layer's output, one line per record, log scale.

    Tables `outlier.inf_norm_layer` [L] and `outlier.kurtosis_layer` [L].

    Args:
        records: name in the legend -> record.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.2, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (name, record), color in zip(records.items(), colors(records), strict=True):
            for axes, table in ((left, _INF_NORM), (right, _KURTOSIS)):
                values = np.array(_table(record, table), dtype=float)
                axes.plot(values, color=color, marker="o", label=name)
        normal = right.axhline(
            3, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="normal distribution"
        )
        right.legend(handles=[normal])
        _set_title(left, "Largest value of each layer's output", _INF_NORM)
        _set_title(right, "Kurtosis of each layer's output", _KURTOSIS)
        left.set_ylabel("max |h|, mean over windows")
        right.set_ylabel("kurtosis")
        for axes in (left, right):
            _log_scale(axes)
            axes.set_xlabel("layer")
            axes.xaxis.get_major_locator().set_params(integer=True)
        if len(records) > 1:
            left.legend()
    return figure


def diagnosis_figures(record: DiagnosisRecord) -> dict[str, Figure]:
    """Every figure that the tables of this diagnosis allow, by file name."""
    name = label(record)
    return {"outliers": outlier_lines({name: record}), **record_maps(record, name)}


def save_figures(figures: Mapping[str, Figure], folder: str | Path) -> list[Path]:
    """Write every figure to `folder` as a PNG and an SVG file of its name; returns the paths."""
    return [
        save(figure, Path(folder) / f"{name}.{ending}", "figures")
        for name, figure in figures.items()
        for ending, save in (("png", save_png), ("svg", save_svg))
    ]


def save_png(figure: Figure, path: str | Path, argument: str = "out") -> Path:
    """Write `figure` atomically as a PNG file with 200 dots per inch."""
    stream = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(stream, dpi=200, format="png")
    return write_bytes(path, stream.getvalue(), argument)


def svg(figure: Figure) -> str:
    """`figure` as an inline <svg> element with the colors of the page's CSS.

    Text remains text.  The page must define `--muted`, `--rule`, `--good` and `--bad`.
    """
    text = _svg(figure, transparent=True)
    text = text[text.index("<svg") :]
    for color, name in _PAGE_COLORS.items():
        text = text.replace(color, name)
    return text


def save_svg(figure: Figure, path: str | Path, argument: str = "out") -> Path:
    """Write `figure` atomically as an SVG file, in which text remains text."""
    return write_text(path, _svg(figure, transparent=False), argument)


def _svg(figure: Figure, *, transparent: bool) -> str:
    stream = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(stream, format="svg", transparent=transparent, metadata=_NO_METADATA)
    return stream.getvalue()


def _map(table: Sequence[Sequence[float]], title: str, subtitle: str, kind: _Map) -> Figure:
    values = _rectangle(table)
    rows, columns = values.shape
    with matplotlib.rc_context(_STYLE):
        size = (min(8.2, 2.6 + 0.34 * columns), min(7.5, 1.5 + 0.19 * rows))
        figure = Figure(figsize=(max(size[0], 4.6), max(size[1], 2.6)), layout="constrained")
        axes = figure.subplots()
        _draw_map(figure, axes, values, color_label=kind.color_label)
        axes.set(xlabel=kind.across, ylabel=kind.down)
        _set_title(axes, title, subtitle, margin=45)
    return figure


def _draw_map(figure: Figure, axes: Axes, values: np.ndarray, *, color_label: str) -> None:
    rows, columns = values.shape
    # A fixed scale from 0 to 1, so that maps of different models can be compared.
    mesh = axes.pcolormesh(values, vmin=0, vmax=1, cmap="viridis", edgecolors="face", linewidth=0.2)
    axes.set_xticks(np.arange(0, columns, _stride(columns)) + 0.5, labels=_ticks(columns))
    axes.set_yticks(np.arange(0, rows, _stride(rows)) + 0.5, labels=_ticks(rows))
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, label=color_label, aspect=30)
    bar.outline.set_visible(False)


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
    axes.yaxis.set_major_formatter(lambda value, _position: number(value))
    axes.yaxis.set_minor_locator(NullLocator())


def _set_title(axes: Axes, title: str, subtitle: str, *, margin: float = 60) -> None:
    """A title that wraps before the edge of the figure, and a line below it.

    Args:
        margin: points beside the axes, for tick labels and color bars.
    """
    spec = axes.get_subplotspec()
    columns = 1 if spec is None else spec.get_gridspec().ncols
    figure: Any = axes.get_figure(root=True)
    room = 72 * figure.get_size_inches()[0] / columns - margin
    title = textwrap.fill(
        title, max(12, int(room / _BOLD_LETTER)), break_long_words=False, break_on_hyphens=False
    )
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=20)
    axes.annotate(
        subtitle, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points",
        color=MUTED, fontsize=8.5,
    )  # fmt: skip


def _table(record: ModelRecord, name: str) -> Any:
    if name not in record.tables:
        raise UserError(f"record: table {name!r} is missing; it has {sorted(record.tables)}")
    return record.tables[name]


def _rectangle(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Rows of different lengths as an array; missing values are NaN, which is not drawn."""
    values = np.full((len(rows), max(map(len, rows))), np.nan)
    for index, row in enumerate(rows):
        values[index, : len(row)] = [float(value) for value in row]
    return values


def colors(names: Iterable[str]) -> list[str]:
    """One color per record; the main variants have the same color in every figure."""
    others = cycle(COLORS)
    return [VARIANT_COLORS.get(name) or next(others) for name in names]


def _stride(count: int) -> int:
    return next(stride for stride in (1, 2, 5, 10, 20, 50, 100, count) if count / stride <= 12)


def _ticks(count: int) -> list[str]:
    return [str(index) for index in range(0, count, _stride(count))]
