"""Why the null signal is idle, and when it is not.

python experiments/null_signal_effect.py --seeds 100 101

Prints three tables:

1. what the depth weight of a silent branch can change at all, for random sources;
2. the gradient of the loss with respect to beta along training;
3. what the signal moves in the trained decoder, by kind of branch, and how much of it each router
   could express without the signal, from the keys that it reads.

Decoders are those of the plan `necessity` with a null logit of 8 and mixes of unit scale.

Axes: B batch, T tokens, D width, S sources.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from oasis_attn.data.tasks import task_by_name
from oasis_attn.data.trigger import TriggerBatch
from oasis_attn.extension_files import load_extensions
from oasis_attn.lab import DecoderTraining, train_decoder
from oasis_attn.lab.decoder import LAB_SIZES, TrainedDecoder, embed, predict
from oasis_attn.modeling.attention import AttentionCall, observe_attention
from oasis_attn.modeling.variants import settings_of
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import Table, number

SIZE, TASK, SEQUENCES = "lab-4", task_by_name("trigger-every-32"), 128
TRAINING = DecoderTraining(steps=500, batch_size=16)
BETAS = -5.0, 1.0, 3.0
SIGNALS = {
    "attention and MLPs": "on",
    "attention only": "attention_only",
    "MLPs only": "mlp_only",
}
PERIOD = 100  # steps of a row of the second table


def silent_branch() -> Table:
    """The change of a mix when the weight of one source goes from equal to 0."""
    torch.manual_seed(0)
    sources_SBD = F.rms_norm(torch.randn(8, 1000, 64, dtype=torch.float64), (64,))

    def mix(share: float, weight: float, normalized: bool) -> Tensor:
        last_BD = share * sources_SBD[-1]
        last_BD = F.rms_norm(last_BD, (64,), eps=1e-6) if normalized else last_BD
        return (sources_SBD[:-1].sum(0) + weight * last_BD) / (7 + weight)

    def change(share: float, normalized: bool, next_norm: bool) -> float:
        before, after = (mix(share, weight, normalized) for weight in (1.0, 0.0))
        if next_norm:
            before, after = (F.rms_norm(each, (64,)) for each in (before, after))
        return float(((before - after).norm(dim=-1) / before.norm(dim=-1)).mean())

    rows = tuple(
        (
            number(1 - share),
            number(change(share, False, True)),
            number(change(share, False, False)),
            number(change(share, True, True)),
        )
        for share in (1.0, 0.5, 0.1, 0.01, 0.001)
    )
    return Table(
        title="Relative change of a mix of 8 sources when one of them loses its depth weight",
        columns=("its null probability", "after a norm", "without a norm", "branch of unit scale"),
        rows=rows,
    )


def trained(seed: int, beta_init: float) -> tuple[TrainedDecoder, Tensor]:
    """A decoder, and the gradient of the loss with respect to beta in each step, [steps, R]."""
    routers, gradients = 2 * LAB_SIZES[SIZE] + 1, []

    def record(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        (raw_R,) = (x for x in optimizer.param_groups[0]["params"] if x.shape == (routers,))
        gradients.append(raw_R.grad / torch.sigmoid(raw_R.detach()))  # beta = softplus(raw)

    settings = settings_of("oasis_unit") | {"null_logit": 8.0, "beta_init": beta_init}
    handle = register_optimizer_step_pre_hook(record)
    try:
        result = train_decoder(SIZE, settings, TASK, TRAINING, seed=seed)
    finally:
        handle.remove()
    return result, torch.stack(gradients)[:, 1:]  # router 0 has one source


def gradient_rows(seed: int, beta_init: float, gradients: Tensor) -> list[tuple[str, ...]]:
    rows = []
    for start in range(0, len(gradients), PERIOD):
        part = gradients[start : start + PERIOD]
        mean_R, spread_R = part.mean(0), part.std(0) / len(part) ** 0.5
        rows.append(
            (
                f"{beta_init:g}",
                str(seed),
                f"{start + 1} to {start + len(part)}",
                number(float(part.abs().mean())),
                number(float(mean_R.abs().mean())),
                f"{int((mean_R.abs() > 3 * spread_R).sum())} of {len(mean_R)}",
                number(float(mean_R.mean())),
            )
        )
    return rows


@torch.no_grad()
def seen(model: Any, batch: TriggerBatch) -> tuple[Tensor, Tensor]:
    """The sources [B, T, S, D] and their psi [B, T, S]."""
    psi: list[Tensor] = []
    branches: list[Tensor] = []

    def attention(call: AttentionCall) -> None:
        psi.append(call.null_BHT.mean(1))

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        branches.append(output[0] if isinstance(output, tuple) else output)

    layers = model.model.layers
    handles = [part.register_forward_hook(keep) for x in layers for part in (x.self_attn, x.mlp)]
    with observe_attention(model, attention):
        predict(model, batch.x_BTN)
    for handle in handles:
        handle.remove()
    embedding_BTD = embed(model, batch.x_BTN)
    both = [torch.zeros_like(psi[0]), *(x for each in psi for x in (each, each))]
    return torch.stack([embedding_BTD, *branches], -2), torch.stack(both, -1)


def explained(keys: Tensor, signal: Tensor) -> float:
    """R^2 of the least squares fit of the signal [N, S] by a query on the keys [N, S, D].

    Both are centered over the sources, because a softmax ignores what they have in common.
    """
    keys, signal = keys - keys.mean(1, keepdim=True), signal - signal.mean(1, keepdim=True)
    x, y = keys.flatten(0, 1).double(), signal.flatten().double()
    fit = torch.linalg.lstsq(x, y.unsqueeze(-1), driver="gelsd").solution
    return 1 - float((y - (x @ fit).squeeze(-1)).square().sum() / y.square().sum())


@torch.no_grad()
def moved_row(seed: int, beta_init: float, model: Any, batch: TriggerBatch) -> tuple[str, ...]:
    """One row of the third table."""

    def output(signal: str) -> Tensor:
        model.config.null_signal = signal
        return predict(model, batch.x_BTN)

    without, scale = output("off"), batch.y_BTN.square().mean()
    moved = [
        number(float((output(name) - without).square().mean() / scale)) for name in SIGNALS.values()
    ]
    model.config.null_signal = "on"
    sources_BTSD, psi_BTS = seen(model, batch)
    keys = F.rms_norm(sources_BTSD, sources_BTSD.shape[-1:], eps=1e-6).flatten(0, 1)
    psi = psi_BTS.flatten(0, 1)
    shares = [explained(keys[:, :count], psi[:, :count]) for count in range(2, psi.shape[-1] + 1)]
    silent_BTS = sources_BTSD.square().mean(-1).sqrt()[batch.idle_BT]
    return (
        f"{beta_init:g}",
        str(seed),
        *moved,
        number(fmean(shares)),
        number(float(silent_BTS[:, 1::2].mean())),
        number(float(silent_BTS[:, 2::2].mean())),
        number(float(psi_BTS[batch.idle_BT][:, 1::2].mean())),
        number(float(psi_BTS[batch.trigger_BT][:, 1::2].mean())),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="of the decoders")
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    load_extensions([str(Path(__file__).with_name("null_signals.py"))])
    batch = TASK.batch(SEQUENCES, torch.Generator().manual_seed(2**32))
    gradients, moved = [], []
    for beta_init in BETAS:
        for seed in seeds:
            result, found = trained(seed, beta_init)
            gradients += gradient_rows(seed, beta_init, found)
            moved.append(moved_row(seed, beta_init, result.model, batch))
    tables = (
        silent_branch(),
        Table(
            title="Gradient of the loss with respect to beta, mean over routers",
            columns=(
                "beta_init", "seed", "steps", "mean size", "size of the mean",
                "routers with a mean beyond 3 standard errors", "mean",
            ),
            rows=tuple(gradients),
        ),
        Table(
            title="What the signal moves, and what the routers know without it",
            columns=(
                "beta_init", "seed",
                *(f"output change: {name}" for name in SIGNALS),
                "R^2 of psi from the keys", "RMS of idle attention", "RMS of idle MLPs",
                "psi at idle tokens", "psi at triggers",
            ),
            rows=tuple(moved),
        ),
    )  # fmt: skip
    for table in tables:
        print(markdown(table))


if __name__ == "__main__":
    main()
