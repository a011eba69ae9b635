"""Figures from records, with matplotlib.

The title of a figure describes its content; the line below is the name of the table in the record.
Lines have the colors of Paul Tol's `bright` scheme, which color-blind readers can distinguish on
light and dark backgrounds.  Maps use viridis.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from oasis_attn.errors import UserError
from oasis_attn.files import write_bytes
from oasis_attn.records import DiagnosisRecord, ModelRecord
from oasis_attn.report.tables import label, number

INK, MUTED, RULE = "#24292f", "#68717b", "#d5dae0"
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

_INF_NORM, _KURTOSIS = "outlier.inf_norm_layer", "outlier.kurtosis_layer"
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def sink_map(record: DiagnosisRecord) -> Figure:
    """Attention on the first token for every layer and head: table `sink.mass` [L][H]."""
    return _map(
        record,
        "sink.mass",
        title="Attention on the first token",
        color_label="mean attention probability",
        across="head",
        down="layer",
    )


def null_map(record: DiagnosisRecord) -> Figure:
    """Attention on the null option for every layer and head: table `null.mass` [L][H]."""
    return _map(
        record,
        "null.mass",
        title="Attention on the null option",
        color_label="mean null probability",
        across="head",
        down="layer",
    )


def depth_map(record: DiagnosisRecord) -> Figure:
    """Mean weight of each source in each depth router: table `depth.weights`, [router][source].

    Rows differ in length, because a router reads only the outputs of previous sublayers.
    """
    return _map(
        record,
        "depth.weights",
        title="Weights of the depth routers",
        color_label="mean weight",
        across="source (0 is the embedding)",
        down="router",
    )


def outlier_lines(records: Sequence[DiagnosisRecord]) -> Figure:
    """Largest value and kurtosis of each layer's output, one line per record, log scale.

    Tables `outlier.inf_norm_layer` [L] and `outlier.kurtosis_layer` [L].
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.2, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for record, color in zip(records, _colors(records), strict=True):
            for axes, name in ((left, _INF_NORM), (right, _KURTOSIS)):
                values = np.array(_table(record, name), dtype=float)
                axes.plot(values, color=color, marker="o", label=label(record))
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
    figures = {"outliers": outlier_lines([record])}
    if "sink.mass" in record.tables:
        figures = {"first-token-mass": sink_map(record)} | figures
    if "null.mass" in record.tables:
        figures["null-mass"] = null_map(record)
    if "depth.weights" in record.tables:
        figures["depth-weights"] = depth_map(record)
    return figures


def save_figures(record: DiagnosisRecord, folder: str | Path) -> list[Path]:
    """Write every figure of a diagnosis to `folder` as a PNG file; returns the paths."""
    figures = diagnosis_figures(record)
    return [save_png(figure, Path(folder) / f"{name}.png") for name, figure in figures.items()]


def save_png(figure: Figure, path: str | Path) -> Path:
    """Write `figure` atomically as a PNG file with 200 dots per inch."""
    stream = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(stream, dpi=200, format="png")
    return write_bytes(path, stream.getvalue())


def svg(figure: Figure) -> str:
    """`figure` as an inline <svg> element with the colors of the page's CSS.

    Text remains text.  The page must define `--muted` and `--rule`.
    """
    stream = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(stream, format="svg", transparent=True, metadata=_NO_METADATA)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for color, name in ((INK, "currentColor"), (MUTED, "var(--muted)"), (RULE, "var(--rule)")):
        text = text.replace(color, name)
    return text


def _map(
    record: DiagnosisRecord, table: str, *, title: str, color_label: str, across: str, down: str
) -> Figure:
    values = _rectangle(_table(record, table))
    rows, columns = values.shape
    with matplotlib.rc_context(_STYLE):
        size = (min(8.2, 2.6 + 0.34 * columns), min(7.5, 1.5 + 0.19 * rows))
        figure = Figure(figsize=(max(size[0], 4.6), max(size[1], 2.6)), layout="constrained")
        axes = figure.subplots()
        _draw_map(figure, axes, values, color_label=color_label)
        axes.set(xlabel=across, ylabel=down)
        _set_title(axes, f"{title}: {label(record)}", table)
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


def _set_title(axes: Axes, title: str, subtitle: str) -> None:
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


def _colors(records: Sequence[ModelRecord]) -> list[str]:
    """One color per record; the main variants have the same color in every figure."""
    others = cycle(COLORS)
    return [VARIANT_COLORS.get(label(record)) or next(others) for record in records]


def _stride(count: int) -> int:
    return next(stride for stride in (1, 2, 5, 10, 20, 50, 100, count) if count / stride <= 12)


def _ticks(count: int) -> list[str]:
    return [str(index) for index in range(0, count, _stride(count))]
