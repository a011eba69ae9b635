"""The record, the tables and the figure of the runs of experiments/null_law.py.

python experiments/null_law_report.py --out docs/results/lab/null_law
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from null_law import (
    ARMS,
    DYNAMICS_EVERY,
    GROUPS,
    LENGTHS,
    LEVELS,
    SEQUENCES,
    SLOW,
    Group,
    missing,
    sink,
    sinks,
)

from oasis_attn.files import write_text
from oasis_attn.lab.attention_only_training import TrainingRule
from oasis_attn.lab.null_law import LineFit, crossing, fit_line
from oasis_attn.lab.runs import Run, RunFile
from oasis_attn.records import BenchmarkRecord, Metric
from oasis_attn.report.figures import save_png
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import ABSENT, Table, number
from oasis_attn.report.threshold import threshold_figure

LONGEST_FITTED = 256  # the lines are extended to the other lengths, which test them


def thresholds(group: Group, rows: Sequence[Run], level: float) -> list[float]:
    """The threshold of each seed for which it is known."""
    found = (crossing(sinks(rows, seed), level) for seed in range(group.seeds))
    return [each for each in found if each is not None]


def make_record(file: RunFile, dynamics_rows: list[dict[str, float]]) -> BenchmarkRecord:
    """The thresholds and fits of all groups that are finished."""
    done = [g for g in GROUPS if file.of(g.name) and not missing(g, file.of(g.name))]
    searched = [group for group in done if group.resolution is not None]
    metrics, margins = [], {level: [] for level in LEVELS}
    rows: list[dict[str, Any]] = []
    for group in searched:
        runs = file.of(group.name)
        rows.append(
            {
                "group": group.name,
                "length": group.length,
                "runs": len(runs),
                "solved": sum(run["solved"] for run in runs),
                "thresholds": {f"{x:g}": thresholds(group, runs, x) for x in LEVELS},
            }
        )
        for level in LEVELS:
            found = thresholds(group, runs, level)
            if not found:
                continue
            margins[level] += [c - math.log(group.length) for c in found]
            metrics.append(
                Metric(
                    name=f"null_law.threshold@{level:g}",
                    where=group.name,
                    value=fmean(found),
                    n=len(found),
                    standard_error=stdev(found) / len(found) ** 0.5 if len(found) > 1 else None,
                )
            )
    fits: dict[str, LineFit] = {}
    of_length = [
        group for group in searched if group in LENGTHS.values() and group.length <= LONGEST_FITTED
    ]
    for level in LEVELS:
        points = [
            (math.log(group.length), c)
            for group in of_length
            for c in thresholds(group, file.of(group.name), level)
        ]
        fit = fits[f"{level:g}"] = fit_line(*zip(*points, strict=True))
        values = {
            "slope": (fit.slope, fit.n),
            "intercept": (fit.intercept, fit.n),
            "margin": (max(margins[level]), len(margins[level])),
        }
        metrics += [
            Metric(name=f"null_law.{name}@{level:g}", value=value, n=n)
            for name, (value, n) in values.items()
        ]
    arms = [
        _arm_row(group, file, logit) for group in done if group in ARMS for logit in group.logits
    ]
    fitted = {level: asdict(fit) for level, fit in fits.items()}
    return BenchmarkRecord(
        name="null_law",
        settings={
            "groups": [asdict(group) for group in done],
            "left_out": [group.name for group in GROUPS if group not in done],
            "tolerance": TrainingRule().tolerance,
            "sequences": SEQUENCES,
        },
        metrics=tuple(metrics),
        tables={"thresholds": rows, "fits": fitted, "arms": arms, "dynamics": dynamics_rows},
    )


def _arm_row(group: Group, file: RunFile, logit: float) -> dict[str, Any]:
    rows = [row for row in file.of(group.name) if row["null_logit"] == logit]
    return {
        "group": group.name,
        "null_logit": logit,
        "solved": sum(row["solved"] for row in rows),
        "runs": len(rows),
        "sink": [sink(row) for row in rows],
        "null": [row["null_idle"][0][0] for row in rows],
        "sink_value": [row["sink_value"][0][0] for row in rows],
        "last_null_logit": [row["null_logits"][0][0] for row in rows],
        "trigger_error": [row["trigger_error"] for row in rows],
    }


def threshold_table(record: BenchmarkRecord) -> Table:
    """One row per group and level."""
    rows = []
    for row in record.tables["thresholds"]:
        for level, found in row["thresholds"].items():
            if found:
                metric = record.metric(f"null_law.threshold@{level}", row["group"])
                error = metric.standard_error
                numbers = (
                    f"{metric.value:.3f}",
                    ABSENT if error is None else f"{error:.3f}",
                    str(metric.n),
                    f"{metric.value - math.log(row['length']):.3f}",
                    f"{row['solved']} of {row['runs']}",
                )
                rows.append((row["group"], level, *numbers))
    return Table(
        title="Thresholds of the null logit",
        columns=(
            "group", "probability", "c*", "standard error", "seeds", "c* - log(length)", "solved"
        ),
        rows=tuple(rows),
    )  # fmt: skip


def fit_table(record: BenchmarkRecord) -> Table:
    """The lines c* = a + b log(length)."""
    rows = []
    for level, fit in record.tables["fits"].items():
        intervals = [
            "{:.3f} [{:.3f}, {:.3f}]".format(fit[name], *fit[f"{name}_interval"])
            for name in ("slope", "intercept")
        ]
        rows.append((level, *intervals, str(fit["n"]), f"{record[f'null_law.margin@{level}']:.3f}"))
    return Table(
        title="c* = intercept + slope log(length), 1 layer of 1 head",
        columns=(
            "probability", "slope [95 %]", "intercept [95 %]", "n", "largest c* - log(length)"
        ),
        rows=tuple(rows),
    )  # fmt: skip


def arm_table(record: BenchmarkRecord) -> Table:
    """One row per arm and null logit: ranges over seeds."""

    def span(values: Sequence[float]) -> str:
        low, high = number(min(values)), number(max(values))
        return low if low == high else f"{low} to {high}"

    names = ("sink", "null", "sink_value", "last_null_logit", "trigger_error")
    rows = tuple(
        (
            row["group"],
            number(row["null_logit"]),
            *(span(row[name]) for name in names),
            f"{row['solved']} of {row['runs']}",
        )
        for row in record.tables["arms"]
    )
    return Table(
        title="Learned and other nulls, ranges over seeds",
        columns=(
            "group", "first null logit", "idle sink", "idle null", "relative value of the sink",
            "last null logit", "error at triggers", "solved",
        ),
        rows=rows,
    )  # fmt: skip


def dynamics_table(record: BenchmarkRecord) -> Table:
    """The two gradients along training, by autograd and by the equations of `lab/null_law.py`."""
    rows = []
    for row in sorted(record.tables["dynamics"], key=lambda row: row["null_logit"]):
        if row["step"] % (2 * DYNAMICS_EVERY) == 0:
            names = "first", "null", "first_logit", "other_logit", "output", "first_value"
            ratio = row["raise_first"] / row["lower_others"]
            expected = row["raise_first_expected"] / row["lower_others_expected"]
            values = [*(row[name] for name in names), ratio, expected]
            rows.append((number(row["null_logit"]), str(row["step"]), *map(number, values)))
    return Table(
        title="Gradients on the logits of idle queries along training (length 16, seed 0)",
        columns=(
            "null logit", "step", "p first", "p null", "first logit", "other logits", "o . o",
            "o . u first",
            "raise first / lower others", "by the equations",
        ),
        rows=tuple(rows),
    )  # fmt: skip


HEAD = """\
# The law of the null

Attention-only models are trained on the trigger-conditional task with a null of constant logit c.
`length 16, 2x4, batch 32` are models of 2 layers of 4 heads on sequences of 16 tokens, with 32
sequences per step. The sink is the mean probability of the first token at idle queries, of the head
in which it is largest. c* is the null logit above which the sink is below a probability; `oasis
metrics null_law` defines it exactly. Training ends when the largest error in a batch is below
{tolerance:g}: `solved` counts the runs that reached it, and the others ended after {most:,} steps.
The learning rate is 1e-3, or 1e-4 with at most {slow:,} steps where the group says so. The lines
are fitted to 1x1, batch 32, at most {fitted} tokens.

{left_out}

"""


def tables(record: BenchmarkRecord) -> str:
    """All tables in Markdown."""
    left_out = record.settings["left_out"]
    head = HEAD.format(
        tolerance=record.settings["tolerance"],
        most=Group.max_steps,
        slow=SLOW["max_steps"],
        fitted=LONGEST_FITTED,
        left_out=f"Not run: {'; '.join(left_out)}." if left_out else "All groups were run.",
    )
    made = threshold_table(record), fit_table(record), arm_table(record), dynamics_table(record)
    return head + "\n".join(map(markdown, made))


def save_figure(record: BenchmarkRecord, file: RunFile, path: Path) -> None:
    """The sinks by null logit, and the thresholds by length with the fitted lines."""
    searched = [g for g in LENGTHS.values() if any(m.where == g.name for m in record.metrics)]
    points = {
        level: [
            (group.length, c)
            for group in searched
            for c in thresholds(group, file.of(group.name), level)
        ]
        for level in LEVELS
    }
    curves = {
        f"length {group.length}": [(row["null_logit"], sink(row)) for row in file.of(group.name)]
        for group in sorted(searched, key=lambda group: group.length)
    }
    lines = {
        level: (record[f"null_law.intercept@{level:g}"], record[f"null_law.slope@{level:g}"])
        for level in LEVELS
    }
    save_png(threshold_figure(curves, points, lines), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and tables")
    out = parser.parse_args().out
    file = RunFile(out / "runs.jsonl")
    record = make_record(file, RunFile(out / "dynamics.jsonl").rows)
    record.save(out / "record.json")
    write_text(out / "tables.md", tables(record))
    save_figure(record, file, out / "null_law.png")


if __name__ == "__main__":
    main()
