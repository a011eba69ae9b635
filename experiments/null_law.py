"""The law of the null: from which constant null logit on does a trained model have no sink?

python experiments/null_law.py --out docs/results/lab/null_law

Trains attention-only models on the trigger-conditional task with one thread, and finds the
threshold c* of the null logit by length, heads and layers.  Further groups let the null logit be
learned, or give the null a value.  Finished groups of runs are in OUT/runs.jsonl and are not
repeated.  The record, the tables and the figure are made from this file; with --report, nothing is
trained.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from oasis_attn.data.trigger import TriggerTask
from oasis_attn.files import write_text
from oasis_attn.lab.attention_only import AttentionOnlyConfig, AttentionOnlyModels, Start
from oasis_attn.lab.attention_only_training import TrainingRule, measure, train
from oasis_attn.lab.null_law import LineFit, crossing, fit_line, logit_gradients, next_logits
from oasis_attn.lab.runs import Run, RunFile, run_row
from oasis_attn.records import BenchmarkRecord, Metric
from oasis_attn.report.figures import save_png
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import ABSENT, Table, number
from oasis_attn.report.threshold import threshold_figure

LEVELS = 0.5, 0.02
SPACING = 0.5
LIMITS = -1.0, 10.0  # of the null logits of a search
SEQUENCES = 250  # of the measurement
DYNAMICS_LOGITS = 0.0, 2.0, 3.0, 4.5
DYNAMICS_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in seed and null logit.

    Attributes:
        length, heads, layers: of the task and the model.
        batch_size: sequences per step.
        learning_rate, max_steps: as in `TrainingRule`.
        seeds: how many.
        logits: the null logits; of a search, the first ones.
        resolution: widest bracket of a threshold at which the search ends; None: no search.
        normalizer, null_term, null_value: as in `AttentionOnlyConfig`.
    """

    length: int = 16
    heads: int = 1
    layers: int = 1
    batch_size: int = 32
    learning_rate: float = 1e-3
    max_steps: int = 12_000
    seeds: int = 5
    logits: tuple[float, ...]
    resolution: float | None = None
    normalizer: str = "softmax1"
    null_term: str = "none"
    null_value: bool = False

    @property
    def name(self) -> str:
        extra = "".join(
            [
                f", rate {self.learning_rate:g}" if self.learning_rate != 1e-3 else "",
                f", {self.normalizer}" if self.normalizer != "softmax1" else "",
                f", null term {self.null_term}" if self.null_term != "none" else "",
                ", null value" if self.null_value else "",
            ]
        )
        return f"length {self.length}, {self.layers}x{self.heads}, batch {self.batch_size}{extra}"

    @property
    def config(self) -> AttentionOnlyConfig:
        return AttentionOnlyConfig(
            layers=self.layers,
            heads=self.heads,
            normalizer=self.normalizer,
            null_term=self.null_term,
            null_value=self.null_value,
        )


def search(length: int, low: float, high: float, **options: Any) -> Group:
    """A search for the thresholds that starts with the null logits from `low` to `high`."""
    logits = tuple(low + SPACING * step for step in range(round((high - low) / SPACING) + 1))
    return Group(length=length, logits=logits, **{"resolution": 0.25} | options)


SLOW: dict[str, Any] = {"learning_rate": 1e-4, "max_steps": 50_000}
LENGTHS = {  # with fewer sequences from 512 on; the check at length 256 compares the batches
    16: search(16, 2, 3.5),
    64: search(64, 3, 4.5),
    32: search(32, 2.5, 4),
    128: search(128, 3.5, 5),
    256: search(256, 4, 5.5, resolution=0.5),
    512: search(512, 4.5, 6.5, batch_size=8, resolution=0.5),
    1024: search(1024, 4, 6, batch_size=8, resolution=0.5),
}
LONGEST_FITTED = 256  # the lines are extended to the other lengths, which test them
SHAPES = (
    search(16, 2, 3.5, heads=2),
    search(16, 2, 4, layers=2),
    search(16, 2.5, 4, heads=4),
    search(16, 2.5, 4, layers=4, resolution=0.5),
    search(16, 2.5, 4, heads=8, resolution=0.5),
    search(16, 2.5, 4, layers=8, resolution=0.5),
)
CHECKS = (  # of the batch size and the learning rate; the paper: 128, and 1e-4 for several layers
    search(16, 2, 3.5, batch_size=128, seeds=2),
    search(64, 3, 4.5, batch_size=128, seeds=1),
    search(128, 3.5, 5, batch_size=16, seeds=3),
    search(256, 4, 5.5, batch_size=8, seeds=3, resolution=0.5),
    search(16, 2.5, 4.5, layers=2, seeds=2, resolution=0.5, **SLOW),
    search(16, 2.5, 4.5, layers=4, seeds=2, resolution=0.5, **SLOW),
)
ARMS = tuple(
    Group(length=length, seeds=3, logits=logits, **options)
    for length in (16, 64)
    for options, logits in (
        ({"normalizer": "learned_sink"}, (0.0, 2.0, 4.5, 6.0)),
        ({"null_value": True}, (0.0, 2.0, 4.5)),
        ({"normalizer": "learned_sink", "null_value": True}, (0.0, 4.5)),
        ({"null_term": "query"}, (0.0, 4.5)),
        ({"null_term": "log_visible"}, (0.0, 1.0, 2.0)),
    )
)
GROUPS = (  # in the order of their importance
    *(LENGTHS[length] for length in (16, 64, 32)),
    *SHAPES[:2],
    *(arm for arm in ARMS if arm.length == 16),
    LENGTHS[128],
    SHAPES[2],
    LENGTHS[256],
    SHAPES[3],
    *CHECKS,
    *(arm for arm in ARMS if arm.length == 64),
    *SHAPES[4:],
    LENGTHS[512],
    LENGTHS[1024],
)


def run(group: Group, file: RunFile, device: str = "cpu") -> None:
    """Train what is missing of a group."""
    while starts := _missing(group, file.of(group.name)):
        began = time.process_time()
        task = TriggerTask(length=group.length)
        rule = TrainingRule(
            learning_rate=group.learning_rate,
            batch_size=group.batch_size,
            max_steps=group.max_steps,
        )
        trained = train(group.config, task, starts, rule, device=device)
        measured = [measure(each.model, task, sequences=SEQUENCES) for each in trained]
        file.add([run_row(group.name, *pair) for pair in zip(trained, measured, strict=True)])
        seconds = time.process_time() - began
        print(f"{group.name}: {len(starts)} runs, {seconds:.0f} s of processor time", flush=True)


def _missing(group: Group, rows: Sequence[Run]) -> list[Start]:
    starts = []
    for seed in range(group.seeds):
        sinks = _sinks(rows, seed)
        wanted = set(group.logits) - sinks.keys()
        if not wanted and group.resolution is not None:
            wanted = next_logits(
                sinks, LEVELS, spacing=SPACING, resolution=group.resolution, limits=LIMITS
            )
        starts += [Start(seed, logit) for logit in sorted(wanted)]
    return starts


def _sinks(rows: Sequence[Run], seed: int) -> dict[float, float]:
    """Null logit -> first-token probability at idle queries, the largest of any layer and head."""
    return {
        row["null_logit"]: max(max(layer) for layer in row["sink_idle"])
        for row in rows
        if row["seed"] == seed
    }


def thresholds(group: Group, rows: Sequence[Run], level: float) -> list[float]:
    """The threshold of each seed for which it is known."""
    found = (crossing(_sinks(rows, seed), level) for seed in range(group.seeds))
    return [each for each in found if each is not None]


def dynamics() -> list[dict[str, float]]:
    """`LogitGradients` along the training of single models at length 16, seed 0."""
    task, generator = TriggerTask(), torch.Generator().manual_seed(2**30)
    rows = []

    def observe(step: int, models: AttentionOnlyModels, starts: Sequence[Start]) -> None:
        if step % DYNAMICS_EVERY == 0:
            for place, start in enumerate(starts):
                found = asdict(logit_gradients(models.select([place]), task, generator))
                numbers = {name: float(f"{value:.5g}") for name, value in found.items()}
                rows.append({"null_logit": start.null_logit, "step": step} | numbers)

    starts = [Start(0, logit) for logit in DYNAMICS_LOGITS]
    train(AttentionOnlyConfig(normalizer="softmax1"), task, starts, observe=observe)
    return rows


def make_record(file: RunFile, dynamics_rows: list[dict[str, float]]) -> BenchmarkRecord:
    """The thresholds and fits of all groups that are finished."""
    done = [g for g in GROUPS if file.of(g.name) and not _missing(g, file.of(g.name))]
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
        "sink": [max(max(layer) for layer in row["sink_idle"]) for row in rows],
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


def report(file: RunFile, out: Path) -> None:
    """Write the record, the tables and the figure."""
    path = out / "dynamics.jsonl"
    saved = RunFile(path)
    if not saved.rows:
        saved.add(dynamics())
    record = make_record(file, saved.rows)
    record.save(out / "record.json")
    write_text(out / "tables.md", tables(record))
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
        f"length {group.length}": [
            (row["null_logit"], max(max(layer) for layer in row["sink_idle"]))
            for row in file.of(group.name)
        ]
        for group in sorted(searched, key=lambda group: group.length)
    }
    lines = {
        level: (record[f"null_law.intercept@{level:g}"], record[f"null_law.slope@{level:g}"])
        for level in LEVELS
    }
    save_png(threshold_figure(curves, points, lines), out / "null_law.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and tables")
    parser.add_argument(
        "--report", action="store_true", help="train nothing; write the tables again"
    )
    parser.add_argument("--device", default="cpu", help="such as cpu (the default) or cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = RunFile(options.out / "runs.jsonl")
    if not options.report:
        for group in GROUPS:
            run(group, file, options.device)
    report(file, options.out)


if __name__ == "__main__":
    main()
