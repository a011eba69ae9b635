"""The tables of docs/lab.md, from the records of the lab and of the studies of generated tasks.

`benchmarks/publish.py` writes the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean

from matplotlib.figure import Figure

from oasis_attn.records import BenchmarkRecord
from oasis_attn.report.markdown import markdown
from oasis_attn.report.seed_values import seed_values_figure
from oasis_attn.report.tables import ABSENT, Table, number
from oasis_attn.study.criteria import (
    MET,
    MET_WHOLE_INTERVAL,
    NOT_MET,
    CriterionResult,
    check_criteria,
    fails_none,
)
from oasis_attn.study.criteria import rule as criteria_rule
from oasis_attn.study.reading_guide import progress_text
from oasis_attn.study.results import Results
from oasis_attn.study.study_metrics import StudyMetric, study_metrics
from oasis_attn.study.tables import percent, verdict_table
from oasis_attn.study.verdict import judge
from pages import DOCS, RESULTS, fill
from pages import published as published_studies

PAGE = DOCS / "lab.md"
STUDIES = ("necessity", "necessity-depth", "necessity-key-null", "necessity-win", "majority")
LAB = RESULTS / "lab"
UNPUBLISHED = "This study is not published yet.\n"
BATCHES = "batch 32", "batch 8"  # of the models whose thresholds are shown: to length 256, beyond
LONG = "length 64, 1x1, batch 32, "  # of the models with other nulls that are shown
DECODERS = {"sum": "Residual sum", "depth": "Attention Residuals"}
DIGITS = 3
COLUMNS = {  # metric -> header and whether the range over seeds is shown
    "sink.idle_largest": ("idle sink, largest head", True),
    "sink.idle": ("idle sink, mean", False),
    "null.idle": ("idle null, mean", False),
    "task.error": ("task error", True),
    "outlier.max_inf_norm": ("max inf-norm", False),
    "outlier.mean_pearson_kurtosis": ("mean Pearson kurtosis", False),
    "task.error_ratio@w8a8-static-full": ("w8a8-static-full error ratio", True),
    "task.error_ratio@w4a4": ("w4a4 error ratio", False),
    "signal.output_change": ("output moved by the signal", False),
}
FORMAT_COLUMNS = {
    "sink.idle_largest": ("idle sink, largest head", False),
    "task.error": ("task error", False),
    **{
        f"task.error_ratio@{scheme}": (scheme, True)
        for scheme in (
            *("w8a8-static-full", "w8a8-static-linear", "fp8-static", "fp8-dynamic", "mxfp8"),
            *("w4a4", "mxfp4", "nvfp4"),
        )
    },
}
LANGUAGE_COLUMNS = {
    "sink.max_mass": ("largest sink", True),
    "sink.mass": ("mean sink", False),
    "majority.accuracy": ("accuracy of answers", True),
    "perplexity.windowed": ("perplexity", True),
    "outlier.max_inf_norm": ("max inf-norm", False),
    "outlier.massive": ("massive activations", False),
    "outlier.mean_pearson_kurtosis": ("mean Pearson kurtosis", False),
    "perplexity.windowed@w8a8-static-full": ("perplexity, w8a8-static-full", True),
    "perplexity.windowed@w4a4": ("perplexity, w4a4", True),
}
DRAWN = ("sink.idle_largest", "task.error", "task.error@w8a8-static-full")


def page(text: str) -> str:
    """docs/lab.md with every table generated again."""
    generators = (
        *(source, thresholds, learned_nulls, decoder_thresholds, no_op_or_bias, null_law_cells),
        *(rows, verdicts, criteria, growth, depth_verdicts),
        format_rows,
        *(key_null_rows, key_null_verdicts, key_null_criteria),
        *(signal_rows, signal_verdicts, signal_criteria),
        *(language_rows, language_verdicts, language_criteria),
    )
    return fill(PAGE, text, "lab_page.py", generators)


@cache
def published(name: str) -> Results | None:
    """The results of a study; None if it is not under docs/results."""
    return published_studies([name]).get(name)


def source() -> str:
    """Sinks of the models of arXiv 2603.11487 and of other normalizers, trained here."""
    record = BenchmarkRecord.load(LAB / "source" / "record.json")
    names = ("sink_idle", "row_sum_idle", "largest_error", "steps")
    wheres = dict.fromkeys(metric.where for metric in record.metrics)
    rows = []
    for where in wheres:
        found = [record.metric(f"attention_only.{name}", where) for name in names]
        rows.append((where, str(found[0].n), *(number(each.value) for each in found)))
    columns = "model", "seeds", "idle sink, largest head", "idle row sum", "largest error", "steps"
    return markdown(Table(columns=columns, rows=tuple(rows)))


def thresholds() -> str:
    """The smallest null logit without a sink by length, layers and heads, and the fitted line."""
    record = BenchmarkRecord.load(LAB / "null_law" / "record.json")
    rows = []
    for row in sorted(record.tables["thresholds"], key=lambda row: row["length"]):
        name, _, batch = row["group"].rpartition(", ")
        if batch == BATCHES[row["length"] > 256]:
            cells = [name, f"{math.log(row['length']):.2f}"]
            for level in row["thresholds"]:
                metric = record.metric(f"null_law.threshold@{level}", row["group"])
                cells.append(f"{metric.value:.2f} (n {metric.n})")
            rows.append((*cells, f"{row['solved']} of {row['runs']}"))
    levels = (f"c* for a sink below {level}" for level in record.tables["fits"])
    columns = "models", "log(length)", *levels, "converged runs"
    lines = []
    longest = max(record.tables["thresholds"], key=lambda row: row["length"])
    for level, fit in record.tables["fits"].items():
        extended = fit["intercept"] + fit["slope"] * math.log(longest["length"])
        measured = record.metric(f"null_law.threshold@{level}", longest["group"]).value
        slope, low, high = (_short(x) for x in (fit["slope"], *fit["slope_interval"]))
        lines.append(
            f"- Sink below {level}: c* = {_short(fit['intercept'])} + {slope} log(length), 95 % "
            f"interval of the slope {low} to {high}, from {fit['n']} thresholds of models of 1 "
            "layer of 1 head with at most 256 tokens. The largest c* - log(length) of all models "
            f"is {_short(record[f'null_law.margin@{level}'])}. At length {longest['length']}, the "
            f"line is at {extended:.2f}, and c* is {measured:.2f}."
        )
    return markdown(Table(columns=columns, rows=tuple(rows))) + "\n" + "\n".join(lines) + "\n"


def learned_nulls() -> str:
    """Nulls that are learned, have a value, or depend on the query or its position."""
    record = BenchmarkRecord.load(LAB / "null_law" / "record.json")
    columns = ("sink", "null", "last_null_logit", "trigger_error")
    rows = tuple(
        (name, _short(row["null_logit"]), *(_range(row[each]) for each in columns))
        for row in record.tables["arms"]
        if (name := row["group"].removeprefix(LONG)) != row["group"]
    )
    head = "null", "null logit at the start", "idle sink", "idle null", "null logit at the end"
    return markdown(Table(columns=(*head, "error at triggers"), rows=rows))


def decoder_thresholds() -> str:
    """The smallest null logit without a sink in whole decoders, and the fitted lines."""
    record = BenchmarkRecord.load(LAB / "null_law_decoders" / "record.json")
    found = {
        (row["length"], row["layers"], row["residual"], level): values
        for row in record.tables["thresholds"]
        for level, values in row["thresholds"].items()
    }
    cases = sorted({key[2:] for key in found}, key=lambda key: (key[0] != "sum", -float(key[1])))
    rows = []
    for length, layers in sorted({key[:2] for key in found}):
        values = (found.get((length, layers, *case), []) for case in cases)
        cells = (f"{fmean(each):.2f} (n {len(each)})" if each else ABSENT for each in values)
        rows.append((str(length), f"{math.log(length):.2f}", str(layers), *cells))
    columns = (f"{residual}, sink below {level}" for residual, level in cases)
    lines = []
    for case, fit in record.tables["fits"].items():
        residual, level = case.split("@")
        slope, low, high = (_short(x) for x in (fit["slope"], *fit["slope_interval"]))
        lines.append(
            f"- {DECODERS[residual]}, sink below {level}: the slope of c* against log(length) is"
            f" {slope} (95 % interval {low} to {high}), from {fit['n']} thresholds of decoders of 4"
            " layers."
        )
    head = "length", "log(length)", "layers"
    table = markdown(Table(columns=(*head, *columns), rows=tuple(rows)))
    return f"{table}\n" + "\n".join(lines) + "\n"


def no_op_or_bias() -> str:
    """What the first token does in decoders of 4 layers with several nulls and readouts."""
    record = BenchmarkRecord.load(LAB / "null_law_decoders" / "record.json")
    names = "sink", "value", "null_value", "error", "removed", "valueless"
    rows = tuple(
        (
            group.replace(", length 32, 4 layers", ""),
            ABSENT if row["null_logit"] is None else number(row["null_logit"]),
            *(_short(row[name][1]) for name in names),
        )
        for row in record.tables["arms"]
        if "4 layers" in (group := row["group"]) and "key_value_null" not in group
    )
    columns = (
        *("decoders", "null logit", "idle sink", "value of the first token", "value of the null"),
        *("relative error", "added without the first token", "added without its value"),
    )
    return markdown(Table(columns=columns, rows=rows))


def null_law_cells() -> str:
    """Language models by window and null."""
    record = BenchmarkRecord.load(LAB / "null_law_cells" / "record.json")
    names = "sink_largest", "null_mass", "loss_increase", "accuracy"
    rows = tuple(
        (
            row["group"],
            "softmax" if row["null"] is None else row["null"],
            ABSENT if row["null"] is None else f"{row['null_logit']:.2f}",
            str(row["runs"]),
            *(_range(row[name], mean=row["runs"] > 1) for name in names),
        )
        for row in record.tables["runs"]
    )
    columns = (
        *("models", "null", "null logit at the start", "seeds", "sink, largest head"),
        *("mean null", "loss over softmax, nats", "right answers"),
    )
    return markdown(Table(columns=columns, rows=rows))


def rows() -> str:
    """The results of each variant of `necessity`."""
    return _rows("necessity")


def format_rows() -> str:
    """The error ratios of `formats`."""
    return _rows("formats", FORMAT_COLUMNS)


def key_null_rows() -> str:
    """The results of each variant of `necessity-key-null`."""
    return _rows("necessity-key-null")


def signal_rows() -> str:
    """The results of each variant of `necessity-win`."""
    return _rows("necessity-win")


def language_rows() -> str:
    """The results of each variant of `majority`."""
    return _rows("majority", LANGUAGE_COLUMNS)


def _rows(name: str, wanted: Mapping[str, tuple[str, bool]] = COLUMNS) -> str:
    results = published(name)
    if results is None:
        return UNPUBLISHED
    known = {metric.name: metric for metric in results.metrics}
    chosen = {known[name]: column for name, column in wanted.items() if name in known}
    measured, missing = [], []
    for variant in results.plan.variants:
        values = {metric: [*results.values(metric, variant).values()] for metric in chosen}
        if any(values.values()):
            cells = (_cell(m, values[m], spread=spread) for m, (_, spread) in chosen.items())
            seeds = max(map(len, values.values()))
            measured.append((variant, str(seeds), *cells))
        else:
            missing.append(variant)
    columns = "variant", "seeds", *(header for header, _ in chosen.values())
    lines = [f"[`{name}`](results/{name}/tables.md): {progress_text(results)}"]
    if len(results.records) < len(results.plan.trials):
        lines.append("The study is not finished; tables and verdicts are of the finished trials.")
    if missing:
        lines.append(f"These variants have no trials yet: {', '.join(missing)}.")
    text = " ".join(lines)
    return f"{text}\n\n{markdown(Table(columns=columns, rows=tuple(measured)))}"


def figure(results: Results) -> Figure:
    """The metrics `DRAWN` of each variant that is measured."""
    known = {metric.name: metric for metric in results.metrics}
    panels = {
        known[name].label: {
            variant: [*results.values(known[name], variant).values()]
            for variant in dict.fromkeys(trial.variant for trial in results.records)
        }
        for name in DRAWN
    }
    ratios = [known[name].label for name in DRAWN if known[name].scale == "ratio"]
    return seed_values_figure(panels, logarithmic=ratios)


def verdicts() -> str:
    """The verdict on each claim of `necessity`."""
    return _verdicts("necessity")


def criteria() -> str:
    """The acceptance criteria of `necessity`: one column per metric, the worst baseline named."""
    results = published("necessity")
    return (
        _criteria("necessity")
        if results is None
        else f"{criteria_rule(results.plan)}\n\n{_criteria('necessity')}"
    )


def key_null_criteria() -> str:
    """The same criteria for the candidates of `necessity-key-null`."""
    return _criteria("necessity-key-null")


def signal_criteria() -> str:
    """The same criteria for the candidates of `necessity-win`."""
    return _criteria("necessity-win")


def language_criteria() -> str:
    """The acceptance criteria of `majority`, those of the language models of the study."""
    return _criteria("majority")


def _criteria(study: str) -> str:
    results = published(study)
    if results is None:
        return UNPUBLISHED
    known = {metric.name: metric for metric in study_metrics(results.plan.schemes)}
    names = [each.metric for each in results.plan.criteria]
    labels = {name: known[name].label for name in names}
    table = []
    for variant in results.plan.candidates:
        found = check_criteria(results, variant)
        if any(each.n for each in found):
            groups = {
                name: [each for each, own in zip(found, names, strict=True) if own == name]
                for name in labels
            }
            table.append((variant, *map(_criteria_cell, groups.values())))
    columns = ("variant", *labels.values())
    shown = markdown(Table(columns=columns, rows=tuple(table), text_columns=len(columns)))
    none_failed = ", ".join(fails_none(results)) or "no variant"
    return f"No criterion is failed by: {none_failed}.\n\n{shown}"


def growth() -> str:
    """The slopes of log metric against log layers of each variant of `necessity-depth`."""
    results = published("necessity-depth")
    if results is None:
        return UNPUBLISHED
    names = dict.fromkeys(t.metric for claim in results.plan.claims for t in claim.tests)
    metrics = [metric for metric in results.metrics if metric.name in names]
    table = []
    for variant in results.plan.variants:
        slopes = [[*results.slopes(metric, variant).values()] for metric in metrics]
        if any(slopes):
            table.append((variant, *(_range(each, mean=True) for each in slopes)))
    columns = "variant", *(f"slope of {metric.label}" for metric in metrics)
    text = f"[`necessity-depth`](results/necessity-depth/tables.md): {progress_text(results)}"
    return f"{text}\n\n{markdown(Table(columns=columns, rows=tuple(table)))}"


def depth_verdicts() -> str:
    """The verdict on each claim of `necessity-depth`."""
    return _verdicts("necessity-depth")


def key_null_verdicts() -> str:
    """The verdict on each claim of `necessity-key-null`."""
    return _verdicts("necessity-key-null")


def signal_verdicts() -> str:
    """The verdict on each claim of `necessity-win`."""
    return _verdicts("necessity-win")


def language_verdicts() -> str:
    """The verdict on each claim of `majority`."""
    return _verdicts("majority")


def _verdicts(name: str) -> str:
    results = published(name)
    if results is None:
        return UNPUBLISHED
    table = verdict_table(judge(results))
    return markdown(Table(columns=table.columns, rows=table.rows, text_columns=4))


def _criteria_cell(criteria: Sequence[CriterionResult]) -> str:
    """The outcome of criteria on one metric, with the change from the baseline that is worst."""
    tested = [each for each in criteria if each.outcome in (MET_WHOLE_INTERVAL, MET, NOT_MET)]
    if not tested:
        return criteria[0].outcome
    worst = max(tested, key=lambda each: each.change)  # less of every metric here is better
    outcome = next(
        o for o in (NOT_MET, MET, MET_WHOLE_INTERVAL) if o in {e.outcome for e in tested}
    )
    if worst.fixed:
        return f"{_short(worst.change)}, {outcome}"
    against = worst.text.rpartition(" against ")[2]
    return f"{percent(worst.change)} ({against}), {outcome}"


def _cell(metric: StudyMetric, values: Sequence[float], *, spread: bool) -> str:
    if not values:
        return ABSENT
    mean = fmean(values)
    if metric.scale == "ratio":  # as in the tests of claims
        mean = math.exp(fmean(map(math.log, values)))
    return _short(mean) + (f" [{_range(values)}]" if spread else "")


def _range(values: Sequence[float], *, mean: bool = False) -> str:
    low, high = _short(min(values)), _short(max(values))
    text = low if low == high else f"{low} to {high}"
    return f"{_short(fmean(values))} [{text}]" if mean else text


def _short(value: float) -> str:
    return number(float(f"{value:.{DIGITS}g}"))
