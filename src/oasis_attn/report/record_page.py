"""The page of any records, alone or side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oasis_attn.errors import UserError, reason, shown
from oasis_attn.records import (
    BenchmarkRecord,
    DiagnosisRecord,
    DoctorRecord,
    EvaluationRecord,
    ModelRecord,
    Record,
)
from oasis_attn.report.document import Fold, Gallery, Item, Picture, Section
from oasis_attn.report.figures import outlier_lines, record_maps
from oasis_attn.report.record_findings import findings, main_metrics
from oasis_attn.report.record_tables import (
    BEFORE_AFTER,
    array_tables,
    better,
    change_table,
    definitions_table,
    metric_table,
    settings_tables,
)
from oasis_attn.report.remedies import doctor_table, has_tries
from oasis_attn.report.tables import (
    Table,
    activation_table,
    label,
    layer_table,
    sink_table,
)
from oasis_attn.report.values import Value, loss_lines, value_figure

_PICTURES = 4  # metrics that have a figure
_LAYERS = ("outlier.inf_norm_layer", "outlier.kurtosis_layer")
_TABLES = (  # the arrays that each table of a diagnosis needs
    ((*_LAYERS, "sink.mass"), layer_table),
    (("outlier.massive", "outlier.largest"), activation_table),
    (("sink.tokens",), sink_table),
)
_NOT_FINITE = ("nan", "inf", "-inf")


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What the page shows of one record alone."""

    tables: list[Table]
    arrays: list[Table]
    maps: list[Picture]
    losses: list[tuple[float, float]]
    has_layers: bool


def named(records: Mapping[str, Record]) -> dict[str, Record]:
    """The records by a label that no two share: the model or benchmark, with its kind or file.

    Args:
        records: path -> record.
    """
    forms = (
        lambda path: _label(records[path]),
        lambda path: f"{_label(records[path])}, {records[path].kind}",
        lambda path: f"{_label(records[path])} ({Path(path).name})",
        lambda path: f"{_label(records[path])} ({path})",
    )
    found = {}
    for path, record in records.items():
        unique = (form for form in forms if [*map(form, records)].count(form(path)) == 1)
        found[next(unique)(path)] = _with_floats(record)
    return found


def title(records: Mapping[str, Record]) -> str:
    """The heading of the page of these records."""
    if len(records) > 1:
        return f"{len(records)} records side by side"
    ((name, record),) = records.items()
    return f"{record.kind.capitalize()}: {name}"


def answers(records: Mapping[str, Record], paths: Mapping[str, str]) -> list[str]:
    """The sentences above the sections; for the arguments, see `record_sections`."""
    with _refused(", ".join(paths.values())):
        return findings(records)


def record_sections(records: Mapping[str, Record], paths: Mapping[str, str]) -> list[Section]:
    """The sections of the page.

    Args:
        records: the result of `named`.
        paths: label -> path, for errors.

    Raises:
        UserError: an array of a record has not the form that its kind has; the path is named.
    """
    parts = {name: _parts(name, record, paths[name]) for name, record in records.items()}
    several = len(records) > 1
    numbers = [change_table(records), metric_table(records, whole=True)]
    places = metric_table(records, whole=False)
    tries = [doctor_table(record) for record in records.values() if has_tries(record)]
    shown_numbers: list[Item] = [*tries, *(table for table in numbers if table.rows)]
    if places.rows:
        few = len(places.rows) <= 40 and not shown_numbers
        shown_numbers.append(places if few else Fold(places.title, (places,)))
    sections = [Section("Side by side" if several else "Numbers", shown_numbers)]
    figures = _figures(records, parts)
    if figures:
        sections.append(Section("Figures", figures))
    tables = [table for each in parts.values() for table in each.tables]
    if tables:
        folded = [Fold(name, tuple(each.tables)) for name, each in parts.items() if each.tables]
        sections.append(Section("Layers and tokens", folded if several else tables))
    sections.append(Section("Settings", _settings(records)))
    arrays = [
        Fold(f"Arrays of {name}", tuple(each.arrays)) for name, each in parts.items() if each.arrays
    ]
    glossary = definitions_table(records.values())
    if glossary:
        arrays.append(Fold("Definitions of the metrics", (replace(glossary, title="Definitions"),)))
    return [*sections, Section("Details", arrays)] if arrays else sections


def footer(records: Mapping[str, Record]) -> str:
    """The provenance of the numbers: time, device and versions of each different environment."""
    found = {
        f"{record.created[:10]}, {record.environment.device}, "
        + ", ".join(f"{name} {version}" for name, version in record.environment.versions.items())
        for record in records.values()
    }
    return " · ".join(sorted(found))


def _label(record: Record) -> str:
    if isinstance(record, BenchmarkRecord):
        return record.name
    assert isinstance(record, ModelRecord)
    return label(record)


def _with_floats(record: Record) -> Record:
    """The record with numbers for the strings that stand for numbers that are not finite."""

    def floats(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: each if key == "text" else floats(each) for key, each in value.items()}
        if isinstance(value, list):
            return [floats(each) for each in value]
        return float(value) if value in _NOT_FINITE else value

    return replace(record, tables=floats(record.tables))


def _parts(name: str, record: Record, path: str) -> _Parts:
    with _refused(path):
        tables = record.tables
        own = [
            replace(table, title=f"{name}: {table.title}")
            for needed, make in _TABLES
            if isinstance(record, DiagnosisRecord) and set(needed) <= set(tables)
            if (table := make(record)).rows
        ]
        layers = False
        if isinstance(record, ModelRecord) and set(_LAYERS) <= set(tables):
            outlier_lines({name: record})  # fails here if they are not numbers
            layers = True
        return _Parts(
            tables=own,
            arrays=array_tables(record, name),
            maps=[
                Picture(
                    name=f"{Path(name).name}-{kind}",
                    title=figure.axes[0].get_title(loc="left").replace("\n", " "),
                    caption="Colors stand for 0 to 1 in every map, so that maps can be compared.",
                    figure=figure,
                )
                for kind, figure in (
                    record_maps(record, name).items() if isinstance(record, ModelRecord) else ()
                )
            ],
            losses=[(float(row["step"]), float(row["loss"])) for row in tables.get("loss", ())],
            has_layers=layers,
        )


@contextmanager
def _refused(path: str) -> Iterator[None]:
    """Context in which an error in an array of a record becomes a `UserError` with its path."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"record: {shown(path)} has an array of an unexpected form "
            f"({type(error).__name__}: {reason(error)})"
        ) from error


def _figures(records: Mapping[str, Record], parts: Mapping[str, _Parts]) -> list[Item]:
    found: list[Item] = []
    small = [*_changes(records), *_values(records), *_places(records)]
    if small:
        found.append(Gallery(tuple(small)))
    losses = {name: each.losses for name, each in parts.items() if each.losses}
    if losses:
        found.append(
            Picture(
                name="training-loss",
                title="Training loss by step",
                caption="The training loss at each logged step.",
                figure=loss_lines(losses),
            )
        )
    layered = {
        name: record
        for name, record in records.items()
        if parts[name].has_layers and isinstance(record, ModelRecord)
    }
    if layered:
        found.append(
            Picture(
                name="outliers",
                title="Largest value and kurtosis of each layer's output",
                caption="Largest value and kurtosis of each layer's output, on logarithmic axes.",
                figure=outlier_lines(layered),
            )
        )
    for name, each in parts.items():
        if each.maps:
            maps = Gallery(tuple(each.maps))
            found.append(Fold(f"Maps of {name}", (maps,)) if len(records) > 1 else maps)
    return found


def _changes(records: Mapping[str, Record]) -> list[Picture]:
    """Metrics before and after a change, one figure per metric."""
    found: dict[str, list[Value]] = {}
    for label_, record in records.items():
        for metric in record.metrics:
            if metric.where in BEFORE_AFTER:
                name = metric.where if len(records) == 1 else f"{label_}, {metric.where}"
                found.setdefault(metric.name, []).append(_value(name, metric.value))
    return [
        _picture(name, values, "before and after; ")
        for name, values in list(found.items())[:_PICTURES]
    ]


def _values(records: Mapping[str, Record]) -> list[Picture]:
    """The main metrics that records share; of an evaluation, all that have an interval."""
    names = main_metrics(records)[:_PICTURES]
    evaluated = [record for record in records.values() if isinstance(record, EvaluationRecord)]
    names += dict.fromkeys(name for record in evaluated for name in record.intervals)
    found = []
    for name in dict.fromkeys(names):
        values = []
        for label_, record in records.items():
            intervals = record.intervals if isinstance(record, EvaluationRecord) else {}
            for metric in record.each(name):
                if not metric.where:
                    ends = intervals.get(name, (math.nan, math.nan))
                    values.append(_value(label_, metric.value, *ends))
        if values:
            found.append(_picture(name, values))
    return found


def _places(records: Mapping[str, Record]) -> list[Picture]:
    """The metrics of a benchmark by place, or of the doctor by try, with their standard errors."""
    found: dict[str, list[Value]] = {}
    for label_, record in records.items():
        for metric in record.metrics if isinstance(record, BenchmarkRecord | DoctorRecord) else ():
            if metric.where and metric.where not in BEFORE_AFTER:
                name = metric.where if len(records) == 1 else f"{label_}: {metric.where}"
                error = metric.standard_error if metric.standard_error is not None else math.nan
                ends = metric.value - error, metric.value + error
                found.setdefault(metric.name, []).append(_value(name, metric.value, *ends))
    several = {name: values for name, values in found.items() if len(values) > 1}
    return [_picture(name, values) for name, values in list(several.items())[:_PICTURES]]


def _value(name: str, value: float, low: float = math.nan, high: float = math.nan) -> Value:
    return Value(label=name, value=value, low=low, high=high)


def _picture(name: str, values: list[Value], what: str = "") -> Picture:
    direction = better(name)
    subtitle = what + (f"{direction} is better" if direction else "neither direction is better")
    has_interval = any(math.isfinite(each.low) for each in values)
    lines = " A line is the interval, or one standard error." if has_interval else ""
    return Picture(
        name=f"values-{name}",
        title=f"{name} by record",
        caption=f"`{name}`; {subtitle}.{lines}",
        figure=value_figure(values, title=name, subtitle=subtitle),
    )


def _settings(records: Mapping[str, Record]) -> list[Item]:
    """Settings that differ are shown; the others are in a fold."""
    tables = settings_tables(records)
    shown_first = tables[:1] if len(tables) > 1 else []
    return [*shown_first, *(Fold(table.title, (table,)) for table in tables[len(shown_first) :])]
