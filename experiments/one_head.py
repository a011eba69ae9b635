"""Decoders with one layer and one head on the trigger task: which nulls replace the sink?

python experiments/one_head.py --out docs/results/lab/one_head
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from oasis_attn.data.tasks import task_by_name
from oasis_attn.lab import DecoderTraining, measure_decoder
from oasis_attn.lab.decoder import continue_training, new_decoder
from oasis_attn.modeling.variants import settings_of
from oasis_attn.records import BenchmarkRecord, Metric

TASK, SEEDS, SEQUENCES, MEASURED_SEED = "trigger-every-32", 3, 256, 2**32
STEPS, LONG = 700, 2000
MEASURED = "sink.idle", "task.relative_error"
ARMS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vanilla": ("vanilla", {}, STEPS),
    "softmax1, 0": ("softmax1", {}, STEPS),
    "softmax1, 5": ("softmax1", {"null_logit": 5}, STEPS),
    "softmax1, 5, 2,000 steps": ("softmax1", {"null_logit": 5}, LONG),
    "softmax1, 8": ("softmax1", {"null_logit": 8}, STEPS),
    "value_null, 5": ("softmax1", {"token_normalizer": "value_null", "null_logit": 5}, STEPS),
    "softpick": ("softpick", {}, STEPS),
    "gated_attention": ("gated_attention", {}, STEPS),
    "attn_residual": ("attn_residual", {}, STEPS),
    "oasis, 5": ("oasis", {"null_logit": 5}, STEPS),
}


def run(arm: str, seed: int) -> dict[str, Any]:
    """Sink at idle queries and error of one decoder."""
    variant, settings, steps = ARMS[arm]
    task = task_by_name(TASK)
    model = new_decoder("lab-1", settings_of(variant) | settings, task, seed=seed, heads=1)
    model = continue_training(model, task, DecoderTraining(steps=steps), seed=seed).model
    batch = task.batch(SEQUENCES, torch.Generator().manual_seed(MEASURED_SEED))
    found = {metric.name: metric.value for metric in measure_decoder(model, batch)[0]}
    return {"arm": arm, "seed": seed} | {name: found[name] for name in MEASURED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    rows = []
    for arm in ARMS:
        runs = [run(arm, seed) for seed in range(SEEDS)]
        rows += runs
        print(*runs, sep="\n", flush=True)
    make_record(rows).save(out / "record.json")


def make_record(rows: Sequence[dict[str, Any]]) -> BenchmarkRecord:
    """The means over seeds."""
    metrics = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for name in MEASURED:
            values = [row[name] for row in rows if row["arm"] == arm]
            error = stdev(values) / math.sqrt(len(values))
            metrics.append(
                Metric(
                    name=name, where=arm, value=fmean(values), n=len(values), standard_error=error
                )
            )
    return BenchmarkRecord(
        name="one_head",
        metrics=tuple(metrics),
        settings={"task": TASK, "sequences": SEQUENCES, "layers": 1, "heads": 1},
        tables={"runs": list(rows)},
    )


if __name__ == "__main__":
    main()
