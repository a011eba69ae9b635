"""The record and the tables of the runs of experiments/null_law_decoders.py.

python experiments/null_law_decoders_report.py --out docs/results/lab/null_law_decoders
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from null_law_decoders import (
    ARMS,
    GROUPS,
    LEVELS,
    RATE,
    SEQUENCES,
    Group,
    missing,
    sinks,
)

from oasis_attn.files import write_text
from oasis_attn.lab.decoder import HEADS
from oasis_attn.lab.null_law import crossing, fit_line
from oasis_attn.lab.runs import Run, RunFile
from oasis_attn.records import BenchmarkRecord, Metric
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import ABSENT, Table, number

RESIDUALS = {"sum": "residual sum", "depth": "Attention Residuals"}
LEARNED = 0.05
SEARCHES = tuple(group for group in GROUPS if group.spacing)
_TRADE_OFF = tuple(
    group
    for group in SEARCHES
    if group.length == 32 and group.layers in (1, 4) and group.heads == HEADS
)


def make_record(file: RunFile) -> BenchmarkRecord:
    """The thresholds, the lines fitted to them, and the margins, of the runs so far."""
    metrics: list[Metric] = []
    rows: list[dict[str, Any]] = []
    for group in SEARCHES:
        runs = file.of(group.name)
        if not runs:
            continue
        found = {level: thresholds(group, runs, level) for level in LEVELS}
        rows.append(
            {
                "group": group.name,
                "residual": group.residual,
                "length": group.length,
                "layers": group.layers,
                "heads": group.heads,
                "runs": len(runs),
                "error": _span(map(error, runs)),
                "thresholds": {f"{level:g}": found[level] for level in LEVELS},
            }
        )
        metrics += [
            Metric(
                name=f"null_law_decoder.threshold@{level:g}",
                where=group.name,
                value=fmean(found[level]),
                n=len(found[level]),
                standard_error=_standard_error(found[level]),
            )
            for level in LEVELS
            if found[level]
        ]
    fits: dict[str, Any] = {}
    for residual in RESIDUALS:
        for level in LEVELS:
            above, points = [], []
            for row in rows:
                if row["residual"] == residual:
                    c, log_n = row["thresholds"][f"{level:g}"], math.log(row["length"])
                    above += [each - log_n for each in c]
                    if row["layers"] == 4 and row["heads"] == HEADS:
                        points += [(log_n, each) for each in c]
            values = {
                "margin": (max(above), len(above)),
                "median_margin": (median(above), len(above)),
            }
            if len({x for x, _ in points}) > 2:
                fit = fits[f"{residual}@{level:g}"] = asdict(fit_line(*zip(*points, strict=True)))
                values |= {name: (fit[name], fit["n"]) for name in ("slope", "intercept")}
            metrics += [
                Metric(name=f"null_law_decoder.{name}@{level:g}", where=residual, value=value, n=n)
                for name, (value, n) in values.items()
            ]
    return BenchmarkRecord(
        name="null_law_decoders",
        settings={
            "groups": [group.name for group in GROUPS if file.of(group.name)],
            "left_out": len(list(missing(file))),  # at least; a search can ask for more later
            "training": asdict(GROUPS[0].training),
            "trigger_rate": RATE,
            "sequences": SEQUENCES,
        },
        metrics=tuple(metrics),
        tables={
            "thresholds": rows,
            "fits": fits,
            "strengths": [row for group in _TRADE_OFF for row in _by_logit(group, file)],
            "arms": [
                row | {"group": group.name}
                for group in (*_TRADE_OFF, *ARMS)
                for row in _by_logit(group, file, arms=True)
            ],
        },
    )


def thresholds(group: Group, rows: Sequence[Run], level: float) -> list[float]:
    """The threshold of each seed for which it is known."""
    found = (crossing(sinks(rows, seed), level) for seed in range(group.seeds))
    return [each for each in found if each is not None]


def error(row: Run) -> float:
    """Relative to the mean square of the target."""
    return float(row["error_idle"] + row["error_trigger"])


def _by_logit(group: Group, file: RunFile, *, arms: bool = False) -> list[dict[str, Any]]:
    """Ranges over seeds, for each null logit of all seeds; `arms`: those that ARMS have too."""
    rows: list[dict[str, Any]] = []
    logits = set(group.logits)
    if arms:
        logits &= {None, *(logit for arm in ARMS for logit in arm.logits)}
    for logit in sorted(logits, key=lambda c: -math.inf if c is None else c):
        runs = [row for row in file.of(group.name) if row["null_logit"] == logit]
        columns: dict[str, Callable[[Run], float]] = (
            {
                "sink": lambda row: _of_largest(row, "sink"),
                "value": lambda row: _of_largest(row, "value_first"),
                "null_value": lambda row: max(map(max, row.get("value_null", [[0.0]]))),
                "error": error,
                "removed": lambda row: row["removed_idle"] - row["error_idle"],
                "valueless": lambda row: row["valueless_idle"] - row["error_idle"],
            }
            if arms
            else {
                "sink": lambda row: _of_largest(row, "sink"),
                "null": lambda row: fmean(map(fmean, row["null"])),
                "error": error,
                "error_idle": lambda row: row["error_idle"],
                "steps": _learned,
            }
        )
        if runs:
            spans = {name: _span(map(column, runs)) for name, column in columns.items()}
            head = {"group": group.name, "null_logit": logit, "runs": len(runs)}
            rows.append(head | spans)
    return rows


def _of_largest(row: Run, table: str) -> float:
    """The entry of the head with the largest sink."""
    heads = [
        (sink, value)
        for sinks_H, values_H in zip(row["sink"], row[table], strict=True)
        for sink, value in zip(sinks_H, values_H, strict=True)
    ]
    return float(max(heads)[1])


def _learned(row: Run) -> float:
    """Steps until the mean loss since the last logged step is below a share of the first one."""
    losses = row["losses"]
    below = [place for place, loss in enumerate(losses) if loss < LEARNED * losses[0]]
    steps = GROUPS[0].training.steps
    return steps * (below[0] + 1) / len(losses) if below else math.inf


def _span(values: Iterable[float]) -> list[float]:
    """Smallest, median and largest."""
    each = sorted(values)
    return [each[0], median(each), each[-1]]


def _standard_error(values: Sequence[float]) -> float | None:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def threshold_table(record: BenchmarkRecord) -> Table:
    """One row per group and level."""
    rows = []
    for row in record.tables["thresholds"]:
        for level, found in row["thresholds"].items():
            if found:
                mean, deviation = fmean(found), _standard_error(found)
                log_n = math.log(row["length"])
                numbers = (
                    f"{mean:.2f}",
                    ABSENT if deviation is None else f"{deviation:.2f}",
                    str(len(found)),
                    f"{mean - log_n:.2f}",
                    f"{max(found) - log_n:.2f}",
                    _shown(row["error"]),
                )
                rows.append((row["group"], level, *numbers))
    return Table(
        title="Thresholds of the null logit in decoders",
        columns=(
            "group", "probability", "c*", "standard error", "seeds", "c* - log(length)",
            "largest of a seed", "relative error",
        ),
        rows=tuple(rows),
    )  # fmt: skip


def fit_table(record: BenchmarkRecord) -> Table:
    """The lines c* = a + b log(length), decoders of 4 layers and 2 heads."""
    rows = []
    for residual, label in RESIDUALS.items():
        for level in LEVELS:
            fit = record.tables["fits"].get(f"{residual}@{level:g}")
            if fit is not None:
                intervals = (
                    "{:.2f} [{:.2f}, {:.2f}]".format(fit[name], *fit[f"{name}_interval"])
                    for name in ("slope", "intercept")
                )
                margin = record.metric(f"null_law_decoder.margin@{level:g}", residual).value
                rows.append((label, f"{level:g}", *intervals, str(fit["n"]), f"{margin:.2f}"))
    return Table(
        title="c* = intercept + slope log(length), decoders of 4 layers and 2 heads",
        columns=(
            "residual", "probability", "slope [95 %]", "intercept [95 %]", "n",
            "largest c* - log(length), all groups",
        ),
        rows=tuple(rows),
    )  # fmt: skip


def strength_table(record: BenchmarkRecord) -> Table:
    """What a stronger null costs."""
    names = "sink", "null", "error", "error_idle", "steps"
    return Table(
        title="What a stronger null removes and what it costs, length 32",
        columns=(
            "group", "null logit", "runs", "idle sink", "idle null", "relative error",
            "of which idle", "steps to learn",
        ),
        rows=tuple(
            (*_head(row), *(_shown(row[name]) for name in names))
            for row in record.tables["strengths"]
        ),
    )  # fmt: skip


def arm_table(record: BenchmarkRecord) -> Table:
    """No-op or bias."""
    names = "sink", "value", "null_value", "error", "removed", "valueless"
    return Table(
        title="Is the sink a no-op or a bias? Length 32",
        columns=(
            "group", "null logit", "runs", "idle sink", "value of the first token",
            "value of the null", "relative error", "idle error added without the first token",
            "idle error added without its value",
        ),
        rows=tuple(
            (*_head(row), *(_shown(row[name]) for name in names))
            for row in record.tables["arms"]
        ),
    )  # fmt: skip


def _head(row: dict[str, Any]) -> tuple[str, str, str]:
    c = row["null_logit"]
    return row["group"], ABSENT if c is None else number(c), str(row["runs"])


def _shown(span: Sequence[float]) -> str:
    """The median, and the range if it is not a point."""
    low, middle, high = (f"{float(value):.2g}" for value in span)  # JSON has "inf" as text
    return middle if low == high else f"{middle} ({low} to {high})"


HEAD = """\
# The law of the null in decoders

Decoders of the plan `necessity` (width 64; 2 heads, or as many as the group says) are trained on
the trigger task, in which each token is a trigger with probability {rate:g}, with a null of
constant logit c: `sum` is the variant `softmax1`, `depth` is `oasis`.  Training takes {steps} steps
of {batch} sequences, or as many as the group says.  The sink is the mean probability of the first
token at idle queries, of the head in which it is largest, and c* is the null logit above which it
is below a probability.  Errors are mean squares of tokens after the first, relative to that of the
target.  `steps to learn`: until the mean loss of {part} steps is below {learned:.0%} of that of the
first {part}.  Values are medians, with the range over seeds.

In the last table, the value of the first token is that of the head with the largest sink, and the
value of the null is the largest: their norms after the output projection, relative to the mean over
the other tokens.  Without the first token, the weights of the others and of the null are divided by
their sum; without its value, they are kept.

{left_out}

"""


def tables(record: BenchmarkRecord) -> str:
    """All tables in Markdown."""
    training, left_out = record.settings["training"], record.settings["left_out"]
    head = HEAD.format(
        rate=record.settings["trigger_rate"],
        steps=training["steps"],
        batch=training["batch_size"],
        part=training["steps"] // 20,
        learned=LEARNED,
        left_out=f"At least {left_out} runs are missing." if left_out else "All runs were made.",
    )
    made = threshold_table(record), fit_table(record), strength_table(record), arm_table(record)
    return head + "\n".join(map(markdown, made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and tables")
    out = parser.parse_args().out
    record = make_record(RunFile(out / "runs.jsonl.gz"))
    record.save(out / "record.json")
    write_text(out / "tables.md", tables(record))


if __name__ == "__main__":
    main()
