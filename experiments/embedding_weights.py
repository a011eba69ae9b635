"""How much of the embedding depth routing reads, at the first token and at the others.

python experiments/embedding_weights.py --out docs/results/lab/embedding_weights

Trains decoders with depth routing and softmax as the trials of the plan `necessity-content` do, and
measures the depth weight of the embedding in each router.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from oasis_attn.lab.decoder import predict
from oasis_attn.modeling.depth_cache import RouterCall, observe_depth
from oasis_attn.records import BenchmarkRecord
from oasis_attn.study.decoder_trial import measured_batch, train_trial
from oasis_attn.study.plan import Trial
from oasis_attn.study.plan_file import load_plan

PLAN, VARIANT, SEEDS = "necessity-content", "attn_residual", 3


def embedding_weights(trial: Trial) -> list[list[float]]:
    """For each router with several sources, the mean weight at the first token and at others."""
    model, batch = train_trial(trial).model, measured_batch(trial)
    means = []

    def update(call: RouterCall) -> None:
        weights_BT = call.weights_BTS[..., 0]
        if call.weights_BTS.shape[-1] > 1:
            means.append([float(weights_BT[:, 0].mean()), float(weights_BT[:, 1:].mean())])

    with torch.no_grad(), observe_depth(model, update):
        predict(model, batch.x_BTN)
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    trials = [trial for trial in load_plan(PLAN).trials if trial.variant == VARIANT][:SEEDS]
    runs = []
    for trial in trials:
        runs.append({"seed": trial.seed, "weights": embedding_weights(trial)})
        print(runs[-1], flush=True)
    BenchmarkRecord(
        name="embedding_weights",
        metrics=(),
        settings={"plan": PLAN, "variant": VARIANT, "seeds": [run["seed"] for run in runs]},
        tables={"runs": runs},
    ).save(args.out / "record.json")


if __name__ == "__main__":
    main()
