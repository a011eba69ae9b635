"""The tables about the law of the null, from the records of experiments/."""

from __future__ import annotations

import math
from statistics import fmean

from oasis_attn.lab.null_law import fit_line
from oasis_attn.records import BenchmarkRecord
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import ABSENT, Table, number
from pages import RESULTS, short, value_range

LAB = RESULTS / "lab"
BATCHES = "batch 32", "batch 8"  # of the models whose thresholds are shown: to length 256, beyond
LONG = "length 64, 1x1, batch 32, "  # of the models with other nulls that are shown
ANNEALED = {
    "sink.max_mass": "largest sink",
    "sink.mass": "mean sink",
    "null.mass": "mean null",
    "outlier.max_inf_norm_layer": "largest value in a layer's output",
    "majority.accuracy": "accuracy of answers",
    "perplexity.windowed": "perplexity",
    "perplexity.windowed@w8a8-static-full": "perplexity, w8a8-static-full",
    "perplexity.windowed@w4a4": "perplexity, w4a4",
}
DECODERS = {"sum": "residual sum", "depth": "Attention Residuals"}
SLOPES = {  # of decoders of 2 heads: layers, and the longest sequences
    "1 layer, 16 to 1,024 tokens, batches of 16": (1, math.inf),
    "4 layers, 16 to 64 tokens, batches of 16": (4, 64),
    "4 layers, 16 to 256 tokens, batches of 16 to 4": (4, math.inf),
}


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
        name, batch, rate = row["group"].partition(f", {BATCHES[row['length'] > 256]}")
        if batch:
            cells = [f"{name}{rate}", f"{math.log(row['length']):.2f}"]
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
        slope, low, high = (short(x) for x in (fit["slope"], *fit["slope_interval"]))
        lines.append(
            f"- Sink below {level}: c* = {short(fit['intercept'])} + {slope} log(length), 95 % "
            f"interval of the slope {low} to {high}, from {fit['n']} thresholds of models of 1 "
            "layer of 1 head with at most 256 tokens. The largest c* - log(length) of all models "
            f"is {short(record[f'null_law.margin@{level}'])}. At length {longest['length']}, the "
            f"line is at {extended:.2f}, and c* is {measured:.2f}."
        )
    return markdown(Table(columns=columns, rows=tuple(rows))) + "\n" + "\n".join(lines) + "\n"


def learned_nulls() -> str:
    """Nulls that are learned, have a value, or depend on the query or its position."""
    record = BenchmarkRecord.load(LAB / "null_law" / "record.json")
    columns = ("sink", "null", "last_null_logit", "trigger_error")
    rows = tuple(
        (name, short(row["null_logit"]), *(value_range(row[each]) for each in columns))
        for row in record.tables["arms"]
        if (name := row["group"].removeprefix(LONG)) != row["group"]
    )
    head = "null", "null logit at the start", "idle sink", "idle null", "null logit at the end"
    return markdown(Table(columns=(*head, "error at triggers"), rows=rows))


def decoder_thresholds() -> str:
    """The smallest null logit without a sink in whole decoders."""
    record = BenchmarkRecord.load(LAB / "null_law_decoders" / "record.json")
    found, batches = {}, {}
    for row in record.tables["thresholds"]:
        shape = row["length"], row["layers"], row["heads"]
        _, named, batch = row["group"].partition(", batch ")
        batches[shape] = batch if named else str(record.settings["training"]["batch_size"])
        for level, values in row["thresholds"].items():
            found[*shape, row["residual"], level] = values
    cases = sorted({key[3:] for key in found}, key=lambda key: (key[0] != "sum", -float(key[1])))
    rows = []
    for shape in sorted(batches):
        length, layers, heads = shape
        values = (found.get((*shape, *case), []) for case in cases)
        cells = (f"{fmean(each):.2f} (n {len(each)})" if each else ABSENT for each in values)
        head = str(length), f"{math.log(length):.2f}", batches[shape], str(layers), str(heads)
        rows.append((*head, *cells))
    columns = (
        *("length", "log(length)", "batch", "layers", "heads"),
        *(f"{residual}, sink below {level}" for residual, level in cases),
    )
    return markdown(Table(columns=columns, rows=tuple(rows)))


def decoder_slopes() -> str:
    """The slopes of the thresholds in decoders against log(length)."""
    record = BenchmarkRecord.load(LAB / "null_law_decoders" / "record.json")
    rows = []
    for case in record.tables["fits"]:
        residual, level = case.split("@")
        cells = []
        for layers, longest in SLOPES.values():
            points = [
                (math.log(row["length"]), c)
                for row in record.tables["thresholds"]
                if (row["residual"], row["layers"], row["heads"]) == (residual, layers, 2)
                and row["length"] <= longest
                for c in row["thresholds"][level]
            ]
            fit = fit_line(*zip(*points, strict=True))
            low, high = fit.slope_interval
            cells.append(f"{fit.slope:.2f} [{low:.2f} to {high:.2f}] (n {fit.n})")
        rows.append((DECODERS[residual], level, *cells))
    columns = "decoders", "sink below", *SLOPES
    return markdown(Table(columns=columns, rows=tuple(rows)))


def one_head() -> str:
    """Sinks and errors of decoders with one layer and one head."""
    record = BenchmarkRecord.load(LAB / "one_head" / "record.json")
    runs = record.tables["runs"]
    names = "sink.idle", "task.relative_error"
    rows = tuple(
        (arm, *(value_range([run[name] for run in runs if run["arm"] == arm]) for name in names))
        for arm in dict.fromkeys(run["arm"] for run in runs)
    )
    return markdown(Table(columns=("decoder", "idle sink", "relative error"), rows=rows))


def null_anneal() -> str:
    """Trained models whose null logit rises to one of several values."""
    record = BenchmarkRecord.load(LAB / "null_anneal" / "record.json")
    runs = record.tables["runs"]
    rows = tuple(
        (
            name,
            *(
                value_range([run[metric] for run in runs if run["null_logit"] == name], mean=True)
                if metric in next(run for run in runs if run["null_logit"] == name)
                else ABSENT
                for metric in ANNEALED
            ),
        )
        for name in dict.fromkeys(run["null_logit"] for run in runs)
    )
    return markdown(Table(columns=("null logit", *ANNEALED.values()), rows=rows))


def no_op_or_bias() -> str:
    """What the first token does in decoders of 4 layers with several nulls and readouts."""
    record = BenchmarkRecord.load(LAB / "null_law_decoders" / "record.json")
    names = "sink", "value", "null_value", "error", "removed", "valueless"
    rows = tuple(
        (
            group.replace(", length 32, 4 layers", ""),
            ABSENT if row["null_logit"] is None else number(row["null_logit"]),
            *(short(row[name][1]) for name in names),
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
            *(value_range(row[name], mean=row["runs"] > 1) for name in names),
        )
        for row in record.tables["runs"]
    )
    columns = (
        *("models", "null", "null logit at the start", "seeds", "sink, largest head"),
        *("mean null", "loss over softmax, nats", "right answers"),
    )
    return markdown(Table(columns=columns, rows=rows))


NULL_PAGE = (  # of docs/null.md
    *(thresholds, learned_nulls, decoder_thresholds, decoder_slopes, one_head),
    *(no_op_or_bias, null_law_cells, null_anneal),
)
