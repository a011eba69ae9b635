"""Is what softmax adds to the first token one large value, or a large vector of several channels?

python experiments/first_token_vector.py --out docs/results/lab/first_token_vector

Trains decoders with softmax as the trials of two plans do.  In the layer output with the largest
value, it measures the first token: its norm, relative to the median norm of the other tokens, and
how much of its squared norm is in the largest channel and in the largest four.  Takes about half an
hour of one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from oasis_attn.lab.decoder import predict
from oasis_attn.records import BenchmarkRecord
from oasis_attn.study.decoder_trial import measured_batch, train_trial
from oasis_attn.study.plan import Trial
from oasis_attn.study.plan_file import load_plan

VARIANT = "vanilla"
PLANS = "necessity-words", "experiments/massive-words.yaml"


def first_token_vector(trial: Trial) -> dict[str, float]:
    """The first token of the layer output with the largest value.

    Returns:
        `largest` and `largest_over_median` of all sequences, `largest_of_others`, of all other
        tokens, and means over sequences.
    """
    model, batch = train_trial(trial).model, measured_batch(trial)
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    with torch.no_grad():
        predict(model, batch.x_BTN)
    for hook in hooks:
        hook.remove()
    x_BTD = max(outputs, key=lambda output: float(output.abs().max())).double()
    first_BD, norms_BT = x_BTD[:, 0], x_BTD[:, 1:].norm(dim=-1)
    shares_BD = first_BD.square().sort(dim=-1, descending=True).values
    shares_BD /= shares_BD.sum(-1, keepdim=True)
    return {
        "largest": float(first_BD.abs().max()),
        "largest_over_median": float(first_BD.abs().max() / x_BTD.abs().median()),
        "largest_of_others": float(x_BTD[:, 1:].abs().max()),
        "norm": float(first_BD.norm(dim=-1).mean()),
        "norm_over_others": float(first_BD.norm(dim=-1).mean() / norms_BT.median()),
        "share_of_one": float(shares_BD[:, 0].mean()),
        "share_of_four": float(shares_BD[:, :4].sum(-1).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--plans", nargs="+", default=PLANS, help="names or files of plans of decoders"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for plan in map(load_plan, args.plans):
        for trial in plan.trials:
            if trial.variant == VARIANT:
                run = {"plan": plan.name, "seed": trial.seed} | first_token_vector(trial)
                print(run, flush=True)
                runs.append(run)
    BenchmarkRecord(
        name="first_token_vector",
        metrics=(),
        settings={"variant": VARIANT},
        tables={"runs": runs},
    ).save(args.out / "record.json")


if __name__ == "__main__":
    main()
