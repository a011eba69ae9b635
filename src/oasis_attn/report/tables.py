"""Records in, tables of text out, for the terminal and the page alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from oasis_attn.records import DiagnosisRecord, ModelRecord, Record

ABSENT = "-"
_LITERATURE_KURTOSIS = ("outlier.avg_kurtosis", "outlier.max_kurtosis")
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
    """

    title: str = ""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    key_columns: int = 1


def number(value: float) -> str:
    """`value` with four significant digits, and whole from a thousand on."""
    if not math.isfinite(value):
        return str(value)
    if 1e3 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def mean_and_range(values: Sequence[float]) -> str:
    """One value as it is; several (one per seed) as `mean [lowest, highest]`."""
    if len(values) == 1:
        return number(values[0])
    return f"{number(fmean(values))} [{number(min(values))}, {number(max(values))}]"


def comparison(
    groups: Mapping[str, Sequence[Record]],
    columns: Mapping[str, tuple[str, str, str]],
    *,
    title: str = "",
) -> Table:
    """One row per model, one column per whole-model metric.

    Args:
        groups: row name -> the model's records, of every kind, one of each kind per seed.
        columns: column head -> (kind of record, name of the metric in it, its `where`).  A model
            without it shows a dash.
        title: of the table.
    """
    rows = tuple(
        (name, *(_cell(records, *column) for column in columns.values()))
        for name, records in groups.items()
    )
    return Table(title=title, columns=("model", *columns), rows=rows)


def _cell(records: Sequence[Record], kind: str, metric: str, where: str) -> str:
    chosen = [record for record in records if record.kind == kind]
    values = [m.value for record in chosen for m in record.each(metric) if m.where == where]
    return mean_and_range(values) + caveat(metric, chosen) if values else ABSENT


def caveat(metric: str, records: Sequence[Record]) -> str:
    """What stands beside the literature's kurtosis: ` (1 silent, 2 understated)`, or nothing.

    The counts are of tensors, the largest over `records`; see `outlier.silent_tensors` and
    `outlier.understated_kurtosis`.  Other metrics have none.
    """
    if metric not in _LITERATURE_KURTOSIS:
        return ""
    found = []
    for name, word in _CAVEATS.items():
        counts = [m.value for record in records for m in record.each(name) if not m.where]
        if any(counts):
            found.append(f"{max(counts):.0f} {word}")
    return f" ({', '.join(found)})" if found else ""


def variants_table(variants: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every variant with the settings that the first variant does not have."""
    base = next(iter(variants.values()))
    rows = tuple(
        (
            variant,
            " ".join(f"{k}={v}" for k, v in settings.items() if k not in base or base[k] != v),
        )
        for variant, settings in variants.items()
    )
    return Table(
        columns=("variant", f"settings unlike {next(iter(variants))}'s"), rows=rows, text_columns=2
    )


def summary_table(record: ModelRecord) -> Table:
    """The whole-model numbers of a record."""
    rows = tuple(
        (
            m.name,
            number(m.value) + caveat(m.name, [record]),
            ABSENT if m.standard_error is None else number(m.standard_error),
        )
        for m in record.metrics
        if not m.where
    )
    return Table(title=label(record), columns=("measure", "value", "standard error"), rows=rows)


def layer_table(record: DiagnosisRecord) -> Table:
    """The layers of a diagnosis one by one, means over heads."""
    columns = {
        "max |h|": record.tables["outlier.inf_norm_layer"],
        "kurtosis": record.tables["outlier.kurtosis_layer"],
    }
    if "outlier.pearson_kurtosis_layer" in record.tables:
        columns["Pearson kurtosis"] = record.tables["outlier.pearson_kurtosis_layer"]
    columns |= {
        "first-token mass": _over_heads(record.tables["sink.mass"]),
    }
    if "null.mass" in record.tables:
        columns["null mass"] = _over_heads(record.tables["null.mass"])
    rows = tuple(
        (str(layer), *(number(float(value)) for value in values))
        for layer, values in enumerate(zip(*columns.values(), strict=True))
    )
    return Table(title="layer by layer", columns=("layer", *columns), rows=rows)


def _over_heads(table: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(map(float, heads)) for heads in table]


def label(record: ModelRecord) -> str:
    """How tables and figures call the model of a record: by its variant, or the end of its name."""
    return record.model.variant or Path(record.model.name).name
