"""The figures of the demo.

Everywhere, red is attention on the first token, green is attention on the null (or the repaired
model), and blue is attention on other tokens.  Color is opacity: nothing is drawn where the
probability is 0, so that the figures suit light and dark pages.

Axes: T tokens of a sequence, L layers, H heads.
"""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory

from oasis_attn.records import TrialRecord
from oasis_attn.report import number
from oasis_attn.report.figures import _STYLE, MUTED, RULE, _log_scale, _set_title
from oasis_attn.report.tables import token_name
from oasis_attn.study.demo import SCHEME, Demo, Pretrained
from oasis_attn.study.demo_text import NAMES, largest_activation, percent, relative_errors

FIRST, NULL, OTHER = "#d64545", "#1f9d61", "#3f7fc4"
_GAMMA = 0.4  # opacity is this power of the probability, so that small ones are visible
_NULL_WIDTH, _GAP = 2.0, 1.2  # of the column of the null, in tokens


def sinks_and_values(pretrained: Pretrained) -> Figure:
    """Attention on the first token by head and layer, and the largest value by layer."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.2, 5.6), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.15))
        _draw_sinks(top, pretrained)
        _draw_values(bottom, pretrained)
    return figure


def perplexities(pretrained: Pretrained) -> Figure:
    """The perplexity of the model: unquantized, quantized, and quantized with the prefix."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.2, 2.3), layout="constrained")
        _draw_perplexities(figure.subplots(), pretrained)
    return figure


def lab_maps(lab: tuple[TrialRecord, ...]) -> Figure:
    """The attention maps of the decoders of the lab, two in a row."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.2, 9.2), layout="constrained")
        engine: Any = figure.get_layout_engine()
        engine.set(hspace=0.06, wspace=0.05, rect=(0, 0, 1, 0.98))
        for axes, record in zip(figure.subplots(2, 2).flat, lab, strict=True):
            _draw_attention(axes, record)
    return figure


def overview(demo: Demo) -> Figure:
    """The picture of the README."""
    with matplotlib.rc_context(_STYLE):
        if demo.pretrained is None:
            figure = Figure(figsize=(14, 4.4), layout="constrained")
            lower = figure
        else:
            figure = Figure(figsize=(14, 8.8), layout="constrained")
            parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.05), hspace=0.04)
            upper, lower = parts
            sinks, values, bars = upper.subplots(1, 3, width_ratios=(1.1, 1.1, 1))
            _draw_sinks(sinks, demo.pretrained)
            sinks.set_xlabel("layer")
            _draw_values(values, demo.pretrained)
            _draw_perplexities(bars, demo.pretrained)
        for axes, record in zip(lower.subplots(1, len(demo.lab)), demo.lab, strict=True):
            _draw_attention(axes, record)
    return figure


def _draw_sinks(axes: Axes, pretrained: Pretrained) -> None:
    mass_HL = np.array(pretrained.plain.tables["sink.mass"], dtype=float).T
    heads, layers = mass_HL.shape
    axes.imshow(
        _colored(mass_HL, FIRST), aspect="auto", interpolation="none",
        extent=(-0.5, layers - 0.5, heads - 0.5, -0.5),
    )  # fmt: skip
    axes.set(ylabel="head")
    axes.grid(False)
    _set_title(axes, "Attention on the first token", "each cell is a head; red is all of it")


def _draw_values(axes: Axes, pretrained: Pretrained) -> None:
    table = "outlier.inf_norm_layer"
    plain, prefixed = (
        np.array(record.tables[table], dtype=float)
        for record in (pretrained.plain, pretrained.prefixed)
    )
    axes.plot(plain, color=FIRST, marker="o")
    axes.plot(prefixed, color=NULL, marker="o")
    middle = len(plain) // 2
    for values, color, text, above in (
        (plain, FIRST, "as it is", 9),
        (prefixed, NULL, "with a prefix", -16),
    ):
        axes.annotate(
            text, (middle, values[middle]), (0, above), textcoords="offset points",
            color=color, fontweight="bold", ha="center",
        )  # fmt: skip
    _log_scale(axes)
    axes.margins(y=0.15)
    axes.set(xlabel="layer", ylabel="largest |value|, mean over windows")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    largest = largest_activation(pretrained.plain)
    _set_title(
        axes, "Largest value of each layer's output",
        f"largest in layer {largest['layer']}: {token_name(largest)}, channel {largest['channel']}",
    )  # fmt: skip


def _draw_perplexities(axes: Axes, pretrained: Pretrained) -> None:
    before, broken = pretrained.broken.before_after("perplexity.windowed")
    _, repaired = pretrained.repaired.before_after("perplexity.windowed")
    rows = (
        ("32 bits", before, MUTED),
        ("8 bits", broken, FIRST),
        ("8 bits\nwith prefix", repaired, NULL),
    )
    for row, (_, value, color) in enumerate(rows):
        axes.barh(row, value, 0.62, color=color)
        axes.annotate(
            number(value), (value, row), (5, 0), textcoords="offset points", va="center",
            fontweight="bold",
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), labels=[name for name, _, _ in rows])
    axes.set(xlabel="perplexity (lower is better)", ylim=(len(rows) - 0.5, -0.5))
    axes.set_xlim(0, 1.15 * max(value for _, value, _ in rows))
    axes.grid(axis="y", visible=False)
    axes.set_axisbelow(True)
    how = f"{SCHEME.name}, {SCHEME.observer} ranges, weights per {SCHEME.weight.granularity}"
    _set_title(axes, "Perplexity after quantization", how)


def _draw_attention(axes: Axes, record: TrialRecord) -> None:
    map_TS = np.array(record.tables["attention.map"], dtype=float)
    T = len(map_TS)
    triggers = np.array(record.tables["attention.head"]["triggers"])
    left = -_GAP - _NULL_WIDTH
    box: dict[str, Any] = {"aspect": "auto", "interpolation": "none"}
    tokens = np.concatenate([_colored(map_TS[:, 1:2], FIRST), _colored(map_TS[:, 2:], OTHER)], 1)
    axes.imshow(tokens, extent=(0, T, T, 0), **box)
    axes.imshow(_colored(map_TS[:, :1], NULL), extent=(left, -_GAP, T, 0), **box)
    for start, width in ((left, _NULL_WIDTH), (0, T)):
        frame = Rectangle(
            (start, 0), width, T, fill=False, edgecolor=RULE, linewidth=0.8, clip_on=False
        )
        axes.add_patch(frame)
    axes.set(xlim=(left - 2, T), ylim=(T, 0), xticks=(), yticks=())
    axes.set_box_aspect(1)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.scatter(
        np.full(len(triggers), left - 1), triggers + 0.5, 14, marker=">", color=OTHER, linewidth=0
    )
    has_null = "null.idle" in record.tables
    above = blended_transform_factory(axes.transData, axes.transAxes)
    for x, text, color, align in (
        (left, "null" if has_null else "no null", NULL if has_null else MUTED, "left"),
        (5.0, "first token", FIRST, "left"),
        (T, "other tokens", OTHER, "right"),
    ):
        axes.text(
            x, 1.01, text, transform=above, color=color, ha=align, fontsize=8.5, fontweight="bold"
        )
    full, static, _ = relative_errors(record)
    axes.set_xlabel(f"error {percent(full)}, in 8 bits {percent(static)}", color=MUTED)
    axes.set_title(NAMES[str(record.model.variant)], loc="left", fontweight="bold", pad=20)


def _colored(p: np.ndarray, color: str) -> np.ndarray:
    """RGBA of one color; its opacity increases with the probability."""
    rgba = np.empty((*p.shape, 4))
    rgba[..., :3] = to_rgb(color)
    rgba[..., 3] = np.clip(p, 0, 1) ** _GAMMA
    return rgba
