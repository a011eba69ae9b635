"""The law of the null in whole decoders, and whether a sink is a no-op or a bias.

python experiments/null_law_decoders.py --out docs/results/lab/null_law_decoders --workers 2

Trains decoders with a residual sum and with Attention Residuals (the variant `oasis`) on the
trigger task, and finds the threshold c* of the null logit by length, layers and heads.  Further
groups compare nulls with and without a value, and readouts with and without the final norm.
Finished runs are in OUT/runs.jsonl.gz and are not repeated; with --minutes, it stops in time and
can be resumed.  The record and the tables are made by experiments/null_law_decoders_report.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oasis_attn.data.trigger import TriggerTask
from oasis_attn.lab.decoder import HEADS, DecoderTraining, continue_training, new_decoder, predict
from oasis_attn.lab.null_law import next_logits
from oasis_attn.lab.runs import Run, RunFile, rounded, run_in_processes
from oasis_attn.lab.sink_removal import ValueNorms, sink_removed
from oasis_attn.modeling.attention import AttentionCall, observe_attention
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.modeling.variants import settings_of

LEVELS = 0.5, 0.02
MOST_ABOVE = 8.0  # log(length), of the null logits of a search
SEQUENCES, MEASURE_SEED = 128, 2**32  # of the measurement
RATE = 0.25  # of triggers
_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in seed and null logit.

    Attributes:
        length, layers, heads: of the task and the decoder.
        residual: `sum` or `depth`.
        seeds: how many.
        logits: the null logits; of a search, the first ones; None: without a null.
        spacing: distance of further null logits in a search; 0: no search.
        resolution: widest bracket of a threshold at which the search ends.
        batch_size: sequences per step.
        normalizer: the token normalizer.
        final_norm: whether the readout has a norm.
    """

    length: int = 32
    layers: int = 4
    heads: int = HEADS
    residual: str = "sum"
    seeds: int = 5
    logits: tuple[float | None, ...]
    spacing: float = 0.0
    resolution: float = 0.5
    batch_size: int = 16
    normalizer: str = "softmax1"
    final_norm: bool = True

    @property
    def name(self) -> str:
        heads = "1 head" if self.heads == 1 else f"{self.heads} heads"
        extra = "".join(
            [
                f", {heads}" if self.heads != HEADS else "",
                f", batch {self.batch_size}" if self.batch_size != 16 else "",
                f", {self.normalizer}" if self.normalizer != "softmax1" else "",
                "" if self.final_norm else ", no final norm",
            ]
        )
        layers = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        return f"{self.residual}, length {self.length}, {layers}{extra}"

    @property
    def training(self) -> DecoderTraining:
        return DecoderTraining(steps=500, batch_size=self.batch_size)

    def settings(self, null_logit: float | None) -> dict[str, Any]:
        """Settings of `OasisConfig`."""
        plain = null_logit is None
        variant = {"sum": "vanilla", "depth": "attn_residual" if plain else "oasis"}[self.residual]
        null = {} if plain else {"null_logit": null_logit}
        return settings_of(variant) | {"token_normalizer": self.normalizer} | null


def searches(
    length: int,
    layers: int,
    *,
    start: float | None = None,
    extra: tuple[float, ...] = (),
    **options: Any,
) -> tuple[Group, ...]:
    """Searches for the thresholds with both residuals.

    The first null logits are `start` - 1 to + 2 with a sum, and 0 to 4.5 above it with depth
    routing, and `extra`.  `start` is about log(length) by default.
    """
    if start is None:
        start = round(2 * math.log(length)) / 2
    groups = []
    for residual, first, spacing in (("depth", 0.0, 1.5), ("sum", -1.0, 1.0)):
        grid = (start + first + spacing * step for step in range(4))
        shape = {"residual": residual, "length": length, "layers": layers}
        rule = {"spacing": spacing, "resolution": spacing / 2}
        groups.append(Group(logits=tuple(sorted({*grid, *extra})), **shape, **rule, **options))
    return tuple(groups)


STRONG = 5.5  # about log(32) + 2
EXTRA = 0.0, STRONG, 12.0  # no null to speak of, the advice, and a null that is too strong
LENGTHS = (
    *searches(32, 4, extra=EXTRA),
    *searches(64, 4),
    *searches(16, 4),
    *searches(128, 4, batch_size=8),
    *searches(256, 4, batch_size=4),
)
LAYERS = (
    *searches(32, 1, extra=EXTRA),
    *searches(32, 2),
    *searches(32, 8),
)
SHAPES = tuple(group for heads in (1, 4, 8) for group in searches(32, 4, heads=heads))
ARMS = tuple(
    Group(
        residual=residual, layers=layers, seeds=3, final_norm=final_norm, normalizer=normalizer,
        logits=(None,) if normalizer == "softmax" else (0.0, STRONG),
    )
    for residual, layers in (("sum", 1), ("sum", 4), ("depth", 4))
    for final_norm in (True, False)
    for normalizer in ("softmax", "softmax1", "value_null", "key_value_null")
    if not (normalizer == "softmax1" and final_norm)  # these are in the searches
)  # fmt: skip
SINGLE = tuple(group for length in (16, 64, 128) for group in searches(length, 1))
# The searches start near the thresholds of shorter sequences.
LONG = tuple(group for length in (256, 512, 1024) for group in searches(length, 1, start=3.0))
GROUPS = *LENGTHS, *LAYERS, *SHAPES, *ARMS, *SINGLE, *LONG


@dataclass(frozen=True)
class Unit:
    """One run."""

    group: Group
    seed: int
    null_logit: float | None

    def __str__(self) -> str:
        return f"{self.group.name}, null logit {self.null_logit}, seed {self.seed}"


def missing(file: RunFile) -> Iterator[Unit]:
    """What is to be run, the first seeds of all groups first."""
    for seed in range(max(group.seeds for group in GROUPS)):
        for group in GROUPS:
            if seed < group.seeds:
                for logit in _missing_logits(group, file.of(group.name), seed):
                    yield Unit(group, seed, logit)


def _missing_logits(group: Group, rows: Sequence[Run], seed: int) -> list[float | None]:
    found = sinks(rows, seed)
    wanted = [logit for logit in group.logits if logit not in found]
    if wanted or not group.spacing:
        return wanted
    limits = -2.0, math.log(group.length) + MOST_ABOVE
    return sorted(
        next_logits(
            found, LEVELS, spacing=group.spacing, resolution=group.resolution, limits=limits
        )
    )


def sinks(rows: Sequence[Run], seed: int) -> dict[Any, float]:
    """Null logit -> first-token probability at idle queries, the largest of any layer and head."""
    return {
        row["null_logit"]: max(max(layer) for layer in row["sink"])
        for row in rows
        if row["seed"] == seed
    }


def run(unit: Unit) -> Run:
    """Train and measure one decoder."""
    group, seed = unit.group, unit.seed
    task = TriggerTask(length=group.length, rate=RATE)
    model = new_decoder(
        f"lab-{group.layers}", group.settings(unit.null_logit), task, seed=seed, heads=group.heads
    )
    if not group.final_norm:
        model.model.norm = nn.Identity()
    trained = continue_training(model, task, group.training, seed=seed)
    row = {"group": group.name, "seed": seed, "null_logit": unit.null_logit}
    losses = [each["loss"] for each in trained.losses]
    numbers = measure(trained.model, task) | {"losses": losses}
    return row | {name: rounded(value, _DIGITS) for name, value in numbers.items()}


@torch.no_grad()
def measure(model: OasisForCausalLM, task: TriggerTask) -> dict[str, Any]:
    """Errors relative to the mean square of the target, and by layer and head, at idle queries:

    `sink`, `null`: the probability of the first token, and of the null;
    `uniform`: what the first token would have if all keys had the same probability;
    `value_first`, `value_null`: see `ValueNorms`.
    """
    batch = task.batch(SEQUENCES, torch.Generator().manual_seed(MEASURE_SEED))
    norms = ValueNorms(model)
    heads: dict[str, list[list[float]]] = {"sink": [], "null": [], "uniform": []}

    def observe(call: AttentionCall) -> None:
        norms.update(call)
        visible_T = torch.arange(1, task.length + 1)
        p = {"sink": call.column(0), "null": call.null_BHT}
        p["uniform"] = (1 - call.null_BHT) / visible_T
        for name, p_BHT in p.items():
            heads[name].append(p_BHT.transpose(0, 1)[:, batch.idle_BT].mean(-1).tolist())

    def errors() -> dict[str, float]:
        squares_BT = (predict(model, batch.x_BTN) - batch.y_BTN).square().mean(-1)[:, 1:]
        target = float(batch.y_BTN[:, 1:].square().mean())
        parts = {"idle": batch.idle_BT, "trigger": batch.trigger_BT}
        shares = {k: (squares_BT * v[:, 1:]).mean() / target for k, v in parts.items()}
        return {name: float(value) for name, value in shares.items()}

    with observe_attention(model, observe):
        found = {f"error_{name}": value for name, value in errors().items()}
    for kind, renormalize in (("removed", True), ("valueless", False)):
        with sink_removed(model, renormalize=renormalize):
            found |= {f"{kind}_{name}": value for name, value in errors().items()}
    values: dict[str, Tensor | list[list[float]]] = {
        f"value_{name}": table for name, table in norms.tables().items()
    }
    return found | heads | values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and tables")
    parser.add_argument(
        "--workers", type=int, default=2, help="number of processes (2), of one thread each"
    )
    parser.add_argument("--minutes", type=float, help="after this time, start no further run")
    options = parser.parse_args()
    file = RunFile(options.out / "runs.jsonl.gz")
    run_in_processes(file, missing, run, workers=options.workers, minutes=options.minutes)


if __name__ == "__main__":
    main()
