"""Tables of any record: its metrics, its settings, and the arrays that it contains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from oasis_attn.metrics import GLOSSARY, Definition
from oasis_attn.records import Metric, Record
from oasis_attn.report.glossary import glossary_table
from oasis_attn.report.tables import ABSENT, Table, caveat, number

BEFORE_AFTER = ("before", "after")
Records = Mapping[str, Record]
"""Label -> record."""


def definition_of(name: str) -> Definition | None:
    """The definition of a metric; None if the glossary has none."""
    exact = (each for each in GLOSSARY if each.name == name)
    found = (each for each in GLOSSARY if each.pattern.fullmatch(name))
    return next(exact, None) or next(found, None)


def better(name: str) -> str:
    """`lower` or `higher`; empty if neither is better, or the metric is unknown."""
    definition = definition_of(name)
    return definition.better if definition else ""


def metric_table(records: Records, *, whole: bool) -> Table:
    """One row per metric and place, and a column for each record.

    Args:
        whole: metrics of the whole model; otherwise those of a place in it (a layer, a tensor).
            Metrics before and after a change are in `change_table`.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for label, record in records.items():
        for metric in record.metrics:
            if metric.where not in BEFORE_AFTER and bool(metric.where) != whole:
                cells = found.setdefault((metric.name, metric.where), {})
                cells[label] = _cell(metric, record)
    place = [] if whole else ["where"]
    rows = tuple(
        (name, *([] if whole else [where]), better(name) or ABSENT,
         *(cells.get(label, ABSENT) for label in records))
        for (name, where), cells in found.items()
    )  # fmt: skip
    return Table(
        title="Metrics" if whole else "Metrics by place",
        columns=("metric", *place, "better", *_headers(records)),
        rows=rows,
        text_columns=2 + len(place),
        key_columns=1 + len(place),
    )


def change_table(records: Records) -> Table:
    """One row per metric and record that compares a model before and after a change."""
    rows = []
    for label, record in records.items():
        for name in dict.fromkeys(metric.name for metric in record.metrics):
            values = {m.where: m.value for m in record.each(name)}
            if set(BEFORE_AFTER) <= set(values):
                before, after = (values[where] for where in BEFORE_AFTER)
                change = (after - before) / abs(before) if before else math.nan
                shown = f"{change:+.2%}" if math.isfinite(change) else ABSENT
                rows.append(
                    (label, name, number(before), number(after), shown, better(name) or ABSENT)
                )
    return Table(
        title="Before and after",
        columns=("record", "metric", "before", "after", "change", "better"),
        rows=tuple(rows),
        text_columns=2,
        key_columns=2,
    )


def settings_tables(records: Records) -> list[Table]:
    """The settings of records: those that differ, and those that are equal in all."""
    flat = {label: dict(_settings(record)) for label, record in records.items()}
    names = dict.fromkeys(name for settings in flat.values() for name in settings)
    rows = {name: [flat[label].get(name, ABSENT) for label in records] for name in names}
    if len(records) == 1:
        return [_settings_table("Settings", rows, ("value",))]
    equal = {name: row[:1] for name, row in rows.items() if len(set(row)) == 1}
    different = {name: row for name, row in rows.items() if name not in equal}
    found = [
        _settings_table("Settings that differ", different, _headers(records)),
        _settings_table("Settings that are equal", equal, ("value",)),
    ]
    return [table for table in found if table.rows]


def array_tables(record: Record, label: str) -> list[Table]:
    """Each array of the record: rows with named columns, numbers, or rows of numbers."""
    found = []
    rows: tuple[tuple[str, ...], ...]
    for name, value in record.tables.items():
        title = f"{label}: {name}"
        if isinstance(value, dict):
            rows = tuple((str(key), _shown(each)) for key, each in value.items())
            found.append(Table(title=title, columns=("key", "value"), rows=rows, text_columns=2))
        elif value and all(isinstance(row, dict) for row in value):
            columns = tuple(dict.fromkeys(key for row in value for key in row))
            rows = tuple(tuple(_shown(row.get(key, ABSENT)) for key in columns) for row in value)
            found.append(Table(title=title, columns=columns, rows=rows, text_columns=0))
        elif value:
            lists = [row if isinstance(row, list) else [row] for row in value]
            width = max(map(len, lists))
            rows = tuple(
                (str(index), *map(_shown, row), *[""] * (width - len(row)))
                for index, row in enumerate(lists)
            )
            columns = ("row", *(str(column) for column in range(width)))
            found.append(Table(title=title, columns=columns, rows=rows))
    return found


def definitions_table(records: Iterable[Record]) -> Table | None:
    """The definitions of the metrics of records; None without any."""
    names = dict.fromkeys(metric.name for record in records for metric in record.metrics)
    found = dict.fromkeys(each for name in names if (each := definition_of(name)))
    return glossary_table(found) if found else None


def _cell(metric: Metric, record: Record) -> str:
    error = metric.standard_error
    spread = "" if error is None else f" ± {number(error)}"
    return f"{number(metric.value)}{spread}{caveat(metric.name, record)}"


def _headers(records: Records) -> Sequence[str]:
    return tuple(records) if len(records) > 1 else ("value ± standard error",)


def _settings_table(title: str, rows: Mapping[str, Sequence[str]], columns: Sequence[str]) -> Table:
    cells = tuple((name, *row) for name, row in rows.items())
    return Table(
        title=title, columns=("setting", *columns), rows=cells, text_columns=1 + len(columns)
    )


def _settings(record: Record) -> Iterable[tuple[str, str]]:
    values = record.to_dict()
    for name in ("metrics", "tables", "intervals"):
        values.pop(name, None)
    return _flat("", values)


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), each)
    else:
        yield prefix, _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ABSENT}[value]
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or ABSENT
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(each)}" for key, each in value.items()) or ABSENT
    return str(value) or ABSENT
