"""Null signals that were tried, and controls for some of them.

`log`              mean of log(1 + null / 0.001): null probabilities of 0.01 and 0.5 differ by less
                   than a factor of three
`attention_only`   psi of an MLP is 0: the null probability of an attention layer does not reduce
                   the weight of the following MLP
`mlp_only`         psi of attention is 0
`by_head`          psi is a learned combination of the heads; its initial value is their mean
`silence`          -log(1 - null), with the mean over heads and a floor: the depth weight of a
                   branch is multiplied by (1 - null)^beta, so that a silent branch loses its weight
`silence_attention`, `silence_mlp`    the same for one kind of branch; psi of the other kind is 0

With `_shuffled` or `_averaged`, `silence` and `silence_mlp` are permuted or averaged over all
tokens of the batch, as `shuffled` and `averaged` of the library: controls without the information.

Use them with `oasis --extension experiments/null_signals.py ...`, or import the file in Python.

Axes: B batch, H heads, T tokens, L layers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from oasis_attn import register_null_signal

LOG_FLOOR = 1e-3
"""Below this null probability `log` is about linear; above it grows like the logarithm."""
SILENCE_FLOOR = 1e-3
"""The smallest factor of a depth weight at beta = 1: `silence` is at most 6.9."""


def log(null_BHT: Tensor, layer: int) -> Tensor:  # noqa: ARG001
    return torch.log1p(null_BHT / LOG_FLOOR).mean(1)


def attention_only(null_BHT: Tensor, layer: int) -> tuple[Tensor, None]:  # noqa: ARG001
    return null_BHT.mean(1), None


def silence_of(null_BHT: Tensor) -> Tensor:
    return -(1 - null_BHT.mean(1)).clamp(min=SILENCE_FLOOR).log()


def shuffle(psi_BT: Tensor) -> Tensor:
    order = torch.randperm(psi_BT.numel(), device=psi_BT.device)
    return psi_BT.flatten()[order].view_as(psi_BT)


def average(psi_BT: Tensor) -> Tensor:
    return psi_BT.mean().expand_as(psi_BT)


def keep(psi_BT: Tensor) -> Tensor:
    return psi_BT


def register_silence(name: str, change: Callable[[Tensor], Tensor]) -> None:
    def both(null_BHT: Tensor, layer: int) -> Tensor:  # noqa: ARG001
        return change(silence_of(null_BHT))

    def mlp(null_BHT: Tensor, layer: int) -> tuple[None, Tensor]:  # noqa: ARG001
        return None, change(silence_of(null_BHT))

    register_null_signal(f"silence{name}", both)
    register_null_signal(f"silence_mlp{name}", mlp)


def silence_attention(null_BHT: Tensor, layer: int) -> tuple[Tensor, None]:  # noqa: ARG001
    return silence_of(null_BHT), None


def mlp_only(null_BHT: Tensor, layer: int) -> tuple[None, Tensor]:  # noqa: ARG001
    return None, null_BHT.mean(1)


class ByHead(nn.Module):
    """psi = mean_h a_h null_h, with a learned weight a for each head of each layer."""

    def __init__(self, config):
        super().__init__()
        heads = config.num_hidden_layers, config.num_attention_heads
        self.weights_LH = nn.Parameter(torch.ones(heads))

    def forward(self, null_BHT: Tensor, layer: int) -> Tensor:
        return (null_BHT * self.weights_LH[layer].unsqueeze(-1)).mean(1)


register_null_signal("log", log)
register_null_signal("attention_only", attention_only)
register_null_signal("mlp_only", mlp_only)
register_null_signal("by_head", ByHead)
register_null_signal("silence_attention", silence_attention)
register_silence("", keep)
register_silence("_shuffled", shuffle)
register_silence("_averaged", average)
