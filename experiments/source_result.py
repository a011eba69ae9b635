"""The result of arXiv 2603.11487: softmax attention has a sink where ReLU attention has none.

python experiments/source_result.py --out docs/results/lab/source

Trains 1 layer of 1 head, 2 layers of 2 heads and 4 layers of 4 heads on the trigger-conditional
task, with one thread.  Finished runs are in OUT/runs.jsonl and are not repeated.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

import torch

from oasis_attn.data.trigger import TriggerTask
from oasis_attn.files import write_text
from oasis_attn.lab.attention_only import RELU, AttentionOnlyConfig, Start
from oasis_attn.lab.attention_only_training import TrainingRule, measure, train
from oasis_attn.lab.runs import Run, RunFile, run_row
from oasis_attn.records import BenchmarkRecord, Metric
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import Table, number

ARMS = {  # normalizer, and the null logit of softmax1
    "softmax": ("softmax", 0.0),
    "ReLU": (RELU, 0.0),
    "softmax1, c = 0": ("softmax1", 0.0),
    "softmax1, c = 2": ("softmax1", 2.0),
    "softmax1, c = 4.5": ("softmax1", 4.5),
    "softpick": ("softpick", 0.0),
}
RUNS = (  # layers, heads, number of seeds, arms
    (1, 1, 3, tuple(ARMS)),
    (2, 2, 1, ("softmax", "ReLU")),
    (4, 4, 1, ("softmax", "ReLU")),
    (2, 2, 3, ("softmax", "ReLU")),
)


def group_name(arm: str, layers: int, heads: int) -> str:
    return f"{arm}, {layers} layers of {heads} heads" if layers > 1 else f"{arm}, 1 layer of 1 head"


def run(file: RunFile) -> None:
    """Train what is missing."""
    task = TriggerTask()
    for layers, heads, seeds, arms in RUNS:
        for arm in arms:
            group = group_name(arm, layers, heads)
            normalizer, null_logit = ARMS[arm]
            config = AttentionOnlyConfig(layers=layers, heads=heads, normalizer=normalizer)
            done = {row["seed"] for row in file.of(group)}
            for seed in sorted({*range(seeds)} - done):
                (trained,) = train(config, task, [Start(seed, null_logit)])
                file.add([run_row(group, trained, measure(trained.model, task))])
                print(f"{group}, seed {seed}: {trained.steps} steps", flush=True)


def make_record(file: RunFile) -> BenchmarkRecord:
    """Means over seeds of each group that is finished."""
    metrics = []
    for group in _groups(file):
        rows = file.of(group)
        values = {
            "sink_idle": [max(map(max, row["sink_idle"])) for row in rows],
            "row_sum_idle": [_mean(row, "row_sum_idle") for row in rows],
            "largest_error": [row["largest_error"] for row in rows],
            "steps": [float(row["steps"]) for row in rows],
        }
        for name, found in values.items():
            error = stdev(found) / len(found) ** 0.5 if len(found) > 1 else None
            metrics.append(
                Metric(
                    name=f"attention_only.{name}",
                    where=group,
                    value=fmean(found),
                    n=len(found),
                    standard_error=error,
                )
            )
    rules = {"1 layer": TrainingRule(), "several layers": TrainingRule(learning_rate=1e-4)}
    return BenchmarkRecord(
        name="source",
        settings={name: asdict(rule) for name, rule in rules.items()},
        data={"task": "trigger", "sequences": 1000, "trigger": 8},
        metrics=tuple(metrics),
    )


def _groups(file: RunFile) -> list[str]:
    """Names of the groups with finished runs, smallest models first."""
    names = [group_name(arm, *shape) for *shape, _, arms in RUNS for arm in arms]
    return [name for name in dict.fromkeys(names) if file.of(name)]


def _mean(row: Run, name: str) -> float:
    return fmean(value for layer in row[name] for value in layer)


def table(file: RunFile) -> Table:
    """One row per run."""
    rows = tuple(
        (
            row["group"],
            str(row["seed"]),
            _by_head(row["sink_idle"]),
            _by_head(row["row_sum_idle"]),
            number(row["largest_error"]),
            str(row["steps"]),
        )
        for group in _groups(file)
        for row in file.of(group)
    )
    columns = "model", "seed", "idle sink", "idle row sum", "largest error", "steps"
    return Table(
        title="First-token probability at idle queries, by layer (|) and head",
        columns=columns,
        rows=rows,
    )


def _by_head(heads: list[list[float]]) -> str:
    return " | ".join(" ".join(f"{value:.4f}" for value in layer) for layer in heads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and tables")
    parser.add_argument(
        "--report", action="store_true", help="train nothing; write the tables again"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = RunFile(options.out / "runs.jsonl")
    if not options.report:
        run(file)
    make_record(file).save(options.out / "record.json")
    write_text(options.out / "table.md", markdown(table(file)))


if __name__ == "__main__":
    main()
