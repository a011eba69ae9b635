"""What records say, in sentences computed from their numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from oasis_attn.records import (
    DiagnosisRecord,
    EvaluationRecord,
    Record,
    TrainingRecord,
)
from oasis_attn.report.conclusion import conclusion
from oasis_attn.report.record_tables import BEFORE_AFTER, better
from oasis_attn.report.remedies import doctor_conclusion, has_tries
from oasis_attn.report.tables import number, ranges, token_name

_MOST = 3  # sentences
_CONCLUSIVE = {"range.noise_static", "range.noise_static_rest", "range.noise_dynamic"}
"""The metrics that a diagnosis has had since it concludes."""
_MAIN = ("perplexity.windowed", "task.error", "sink.mass", "outlier.max_inf_norm")


def findings(records: Mapping[str, Record]) -> list[str]:
    """At most three sentences about one record, or about the metrics that several share.

    About a diagnosis and the tries of the doctor, all that they conclude.
    """
    if len(records) == 1:
        ((label, record),) = records.items()
        if has_tries(record):
            return list(doctor_conclusion(None, record, ()))
        about_tables = _about_tables(record)
        if isinstance(record, DiagnosisRecord) and {m.name for m in record.metrics} >= _CONCLUSIVE:
            return [*conclusion(record), *about_tables[:1]]
        said = [*about_tables, *_about_changes(record), *_about_metrics(record)]
        return said[:_MOST] or [f"`{label}` has {len(record.metrics)} numbers."]
    shared = _shared(records)
    said = [_on_shared(name, values) for name, values in shared.items()]
    if len(said) < _MOST:
        changes = [
            f"`{label}`: {sentence}"
            for label, record in records.items()
            for sentence in _about_changes(record)[:1]
        ]
        said += changes
    return said[:_MOST] or [f"The {len(records)} records have no metric in common."]


def main_metrics(records: Mapping[str, Record]) -> list[str]:
    """Whole-model metrics with a better direction that two records have, the main ones first."""
    return list(_shared(records))


def _shared(records: Mapping[str, Record]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for label, record in records.items():
        for metric in record.metrics:
            if not metric.where and better(metric.name) and math.isfinite(metric.value):
                found.setdefault(metric.name, {})[label] = metric.value
    order = sorted(found, key=lambda name: _MAIN.index(name) if name in _MAIN else len(_MAIN))
    return {name: found[name] for name in order if len(found[name]) > 1}


def _on_shared(name: str, values: Mapping[str, float]) -> str:
    order = sorted(values, key=values.__getitem__, reverse=better(name) == "higher")
    best, worst = order[0], order[-1]
    if values[best] == values[worst]:
        return f"`{name}` is {number(values[best])} in all {len(values)} records that have it."
    return (
        f"Of {len(values)} records, `{best}` has the best `{name}`, {number(values[best])}, and "
        f"`{worst}` the worst, {number(values[worst])}."
    )


def _about_tables(record: Record) -> list[str]:
    said = []
    if isinstance(record, DiagnosisRecord):
        rows = record.tables.get("outlier.largest") or []
        sinks = record.tables.get("sink.tokens") or []
        massive = record.tables.get("outlier.massive")
        broken = any(math.isnan(metric.value) for metric in record.each("sink.mass"))
        if sinks:
            first = sinks[0]
            said.append(
                f"The strongest attention sink is {token_name(first)} at position "
                f"{first['position']}, in the layers {ranges(first['layers'])}."
            )
        elif "sink.tokens" in record.tables and not broken:
            said.append("No token is an attention sink.")
        if rows:
            row = max(rows, key=lambda each: abs(each["largest"]))
            known = "" if massive is None else "; it is massive" if massive else "; none is massive"
            token = f"{token_name(row)} at position {row['position']}"
            said.append(
                f"The largest activation is {number(row['largest'])}, in channel {row['channel']} "
                f"of {token}, in layer {row['layer']}{known}."
            )
    if isinstance(record, TrainingRecord) and record.tables.get("loss"):
        rows = record.tables["loss"]
        first, last = rows[0], rows[-1]
        said.append(
            f"The training loss is {number(first['loss'])} at step {first['step']} and "
            f"{number(last['loss'])} at step {last['step']}."
        )
    return said


def _about_changes(record: Record) -> list[str]:
    said = []
    for name in dict.fromkeys(metric.name for metric in record.metrics):
        values = {m.where: m.value for m in record.each(name)}
        if set(BEFORE_AFTER) <= set(values):
            before, after = (values[where] for where in BEFORE_AFTER)
            change = f" ({(after - before) / abs(before):+.1%})" if before else ""
            said.append(f"`{name}` is {number(before)} before and {number(after)} after{change}.")
    return said


def _about_metrics(record: Record) -> list[str]:
    whole = [metric for metric in record.metrics if not metric.where]
    if not whole:
        return _about_places(record)
    order = sorted(whole, key=lambda m: (m.name not in _MAIN, not better(m.name)))
    said = []
    for metric in order[:_MOST]:
        interval = (
            record.intervals.get(metric.name) if isinstance(record, EvaluationRecord) else None
        )
        error = metric.standard_error
        spread = "" if error is None else f" ± {number(error)}"
        if interval:
            spread = f" (95 % interval {number(interval[0])} to {number(interval[1])})"
        said.append(f"`{metric.name}` is {number(metric.value)}{spread} (n = {metric.n}).")
    return said


def _about_places(record: Record) -> list[str]:
    """Where in a benchmark a metric is best and worst."""
    said = []
    for name in dict.fromkeys(metric.name for metric in record.metrics if better(metric.name)):
        values = {
            metric.where: metric.value
            for metric in record.each(name)
            if math.isfinite(metric.value) and metric.where not in BEFORE_AFTER
        }
        order = sorted(values, key=values.__getitem__, reverse=better(name) == "higher")
        if len(order) > 1:
            best, worst = order[0], order[-1]
            said.append(
                f"Of {len(order)} values of `{name}`, the best is that of {best}, "
                f"{number(values[best])}, and the worst that of {worst}, {number(values[worst])}."
            )
    return said
