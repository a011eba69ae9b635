"""Tables of formatted text, for the terminal, Markdown and HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from oasis_attn.records import DiagnosisRecord, ModelRecord, Record

ABSENT = "-"
_LITERATURE_KURTOSIS = ("outlier.avg_kurtosis", "outlier.max_kurtosis")
_NAMED = 5  # largest number of tokens in a table that names them
_LONGEST = 24  # characters of a token's name
_CAVEATS = {"outlier.silent_tensors": "silent", "outlier.understated_kurtosis": "understated"}


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of formatted text.

    Attributes:
        title: title of the table; may be empty.
        columns: header of each column, with its unit; all empty for a table without a header.
        rows: one string per column.
        text_columns: number of leading columns that contain text; the others contain numbers.
        key_columns: number of leading columns that identify a row.  They are repeated if a table
            is too wide for the terminal and its other columns are split into several tables.
        tone: the tone of the badge that a page draws around a cell (see `document.TONES`), from
            its text; empty for none.
    """

    title: str = ""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    key_columns: int = 1
    tone: Callable[[str], str] | None = None


def number(value: float) -> str:
    """`value` with four significant digits; without decimals from 1,000 to 10 million."""
    if not math.isfinite(value):
        return str(value)
    if 1e3 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def percent(share: float) -> str:
    """A share as a percentage, with two significant digits below 10 %."""
    return f"{100 * share:.2g} %" if abs(share) < 0.0995 else f"{100 * share:,.0f} %"


def caveat(metric: str, record: Record) -> str:
    """A warning after the kurtosis of the literature, such as ` (1 silent, 2 understated)`.

    The counts are numbers of tensors; see `outlier.silent_tensors` and
    `outlier.understated_kurtosis`.  The result is empty for other metrics.
    """
    if metric not in _LITERATURE_KURTOSIS:
        return ""
    counts = {
        word: next((m.value for m in record.each(name) if not m.where), 0)
        for name, word in _CAVEATS.items()
    }
    found = [f"{count:.0f} {word}" for word, count in counts.items() if count]
    return f" ({', '.join(found)})" if found else ""


def variants_table(variants: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per variant: the settings that differ from those of the first variant."""
    base = next(iter(variants.values()))
    rows = tuple(
        (
            variant,
            " ".join(f"{k}={v}" for k, v in settings.items() if k not in base or base[k] != v),
        )
        for variant, settings in variants.items()
    )
    return Table(
        columns=("variant", f"settings that differ from {next(iter(variants))}"),
        rows=rows,
        text_columns=2,
    )


def summary_table(record: ModelRecord) -> Table:
    """The whole-model metrics of a record."""
    rows = tuple(
        (
            m.name,
            number(m.value) + caveat(m.name, record),
            ABSENT if m.standard_error is None else number(m.standard_error),
        )
        for m in record.metrics
        if not m.where
    )
    return Table(title=label(record), columns=("metric", "value", "standard error"), rows=rows)


def layer_table(record: DiagnosisRecord) -> Table:
    """One row per layer of a diagnosis; attention metrics are means over heads."""
    columns = {
        "max |h|": record.tables["outlier.inf_norm_layer"],
        "kurtosis": record.tables["outlier.kurtosis_layer"],
    }
    if "outlier.pearson_kurtosis_layer" in record.tables:
        columns["Pearson kurtosis"] = record.tables["outlier.pearson_kurtosis_layer"]
    if "sink.mass" in record.tables:
        columns["first-token mass"] = _over_heads(record.tables["sink.mass"])
    if "null.mass" in record.tables:
        columns["null probability"] = _over_heads(record.tables["null.mass"])
    rows = tuple(
        (str(layer), *(number(float(value)) for value in values))
        for layer, values in enumerate(zip(*columns.values(), strict=True))
    )
    others: dict[str, list[str]] = {}
    for row in record.tables.get("sink.no_map", ()):
        others.setdefault(row["module"], []).append(str(row["layer"]))
    without = "; ".join(f"{', '.join(layers)} ({module})" for module, layers in others.items())
    title = f"By layer; layers without an attention map: {without}" if without else "By layer"
    return Table(title=title, columns=("layer", *columns), rows=rows)


def activation_table(record: DiagnosisRecord) -> Table:
    """The largest massive activations of a diagnosis, one row per token and channel.

    Without a massive activation, the largest ones of any layer.
    """
    title = "Massive activations of layer outputs"
    found = record.tables["outlier.massive"]
    if not found:
        title = "Largest activations of layer outputs; none is massive"
        found = record.tables["outlier.largest"]
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["token"], row["channel"]), []).append(row)
    largest = [(max(rows, key=lambda row: abs(row["largest"])), rows) for rows in groups.values()]
    largest.sort(key=lambda each: abs(each[0]["largest"]), reverse=True)
    return Table(
        title=title,
        columns=("token", "position", "channel", "value", "in layer", "layers"),
        rows=tuple(
            (
                token_name(row),
                str(row["position"]),
                str(row["channel"]),
                number(row["largest"]),
                str(row["layer"]),
                ranges(each["layer"] for each in rows),
            )
            for row, rows in largest[:_NAMED]
        ),
    )


def sink_table(record: DiagnosisRecord) -> Table:
    """The sink tokens of a diagnosis that receive most attention."""
    return Table(
        title="Sink tokens: more than 0.3 of a head's attention",
        columns=("token", "position", "attention", "heads", "layers", "windows"),
        rows=tuple(
            (
                token_name(row),
                str(row["position"]),
                number(row["received"]),
                number(row["heads"]),
                ranges(row["layers"]),
                str(row["windows"]),
            )
            for row in record.tables["sink.tokens"][:_NAMED]
        ),
    )


def head_table(record: DiagnosisRecord) -> Table:
    """The idle and the silent heads of each layer that has some; see `sink.idle_heads`."""
    heads: dict[int, tuple[list[int], list[int]]] = {}
    for column, name in enumerate(("sink.idle_heads", "sink.silent_heads")):
        for layer, head in record.tables.get(name, ()):
            heads.setdefault(layer, ([], []))[column].append(head)
    return Table(
        title="Heads by layer",
        columns=("layer", "idle heads", "silent heads"),
        rows=tuple(
            (str(layer), *(ranges(each) or ABSENT for each in columns))
            for layer, columns in sorted(heads.items())
        ),
        text_columns=3,
    )


def token_name(row: Mapping[str, Any]) -> str:
    """The text of the token that a row is about, quoted, or its id."""
    text = repr(row["text"]) if "text" in row else f"id {row['token']}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]}...{text[0]}"


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as ranges: `0, 3-7`."""
    found: list[list[int]] = []
    for each in sorted(set(numbers)):
        if found and each == found[-1][-1] + 1:
            found[-1][1:] = [each]
        else:
            found.append([each])
    return ", ".join("-".join(map(str, ends)) for ends in found)


def _over_heads(table: Sequence[Sequence[float]]) -> list[float]:
    """Means of the finite values: NaN stands for heads that a layer does not have."""
    known = ([x for x in map(float, heads) if not math.isnan(x)] for heads in table)
    return [fmean(values) if values else math.nan for values in known]


def label(record: ModelRecord) -> str:
    """The name of a model in tables and figures: its variant, or the last part of its name."""
    return record.model.variant or Path(record.model.name).name
