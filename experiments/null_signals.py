"""Null signals that were tried and are not better than that of the paper.

`log`              mean of log(1 + null / 0.001): null probabilities of 0.01 and 0.5 differ by less
                   than a factor of three
`attention_only`   psi of an MLP is 0: the null probability of an attention layer does not reduce
                   the weight of the following MLP
`by_head`          psi is a learned combination of the heads; its initial value is their mean

Use them with `oasis --extension experiments/null_signals.py ...`, or import the file in Python.

Axes: B batch, H heads, T tokens, L layers.
"""

import torch
from torch import Tensor, nn

from oasis_attn import register_null_signal

LOG_FLOOR = 1e-3
"""Below this null probability `log` is about linear; above it grows like the logarithm."""


def log(null_BHT: Tensor, layer: int) -> Tensor:  # noqa: ARG001
    return torch.log1p(null_BHT / LOG_FLOOR).mean(1)


def attention_only(null_BHT: Tensor, layer: int) -> tuple[Tensor, None]:  # noqa: ARG001
    return null_BHT.mean(1), None


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
register_null_signal("by_head", ByHead)
