"""The law of the null: from which constant null logit on does a trained model have no sink?

python experiments/null_law.py --out docs/results/lab/null_law

Trains attention-only models on the trigger-conditional task with one thread, and finds the
threshold c* of the null logit by length, heads and layers.  Further groups let the null logit be
learned, or give the null a value.  Finished groups of runs are in OUT/runs.jsonl and are not
repeated; OUT/dynamics.jsonl has gradients along the training of single models.  The record, the
tables and the figure are made from these files by experiments/null_law_report.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from oasis_attn.data.trigger import TriggerTask
from oasis_attn.lab.attention_only import AttentionOnlyConfig, AttentionOnlyModels, Start
from oasis_attn.lab.attention_only_training import TrainingRule, measure, train
from oasis_attn.lab.null_law import logit_gradients, next_logits
from oasis_attn.lab.runs import Run, RunFile, run_row

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
    while starts := missing(group, file.of(group.name)):
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


def missing(group: Group, rows: Sequence[Run]) -> list[Start]:
    """What has to be trained next, given the runs so far."""
    starts = []
    for seed in range(group.seeds):
        known = sinks(rows, seed)
        wanted = set(group.logits) - known.keys()
        if not wanted and group.resolution is not None:
            wanted = next_logits(
                known, LEVELS, spacing=SPACING, resolution=group.resolution, limits=LIMITS
            )
        starts += [Start(seed, logit) for logit in sorted(wanted)]
    return starts


def sink(row: Run) -> float:
    """The first-token probability at idle queries, the largest of any layer and head."""
    return max(max(layer) for layer in row["sink_idle"])


def sinks(rows: Sequence[Run], seed: int) -> dict[float, float]:
    """Null logit -> `sink`, of the runs with this seed."""
    return {row["null_logit"]: sink(row) for row in rows if row["seed"] == seed}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--device", default="cpu", help="such as cpu (the default) or cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = RunFile(options.out / "runs.jsonl")
    for group in GROUPS:
        run(group, file, options.device)
    gradients = RunFile(options.out / "dynamics.jsonl")
    if not gradients.rows:
        gradients.add(dynamics())


if __name__ == "__main__":
    main()
