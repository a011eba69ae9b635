"""Attention over depth in plain PyTorch: the reference for the other implementations.

It stacks the sources and computes in float32 (float64 for float64 sources).

Axes: B batch, T tokens, D width, S sources, R routers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` itself if it is float64, else `tensor` in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def naive_scores(source_BTD: Tensor, queries_RD: Tensor, eps: float) -> Tensor:
    """g of one source for R routers, `[B, T, R]`: see `autograd.depth_scores`."""
    value = at_least_float32(source_BTD)
    key = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps)
    with torch.autocast(value.device.type, enabled=False):
        return key @ queries_RD.to(value.dtype).T


def naive_sum(sources: Sequence[Tensor], weights_BTS: Tensor) -> Tensor:
    """sum_i weights_i sources_i, `[B, T, D]` in the dtype of the sources."""
    stacked_BTSD = torch.stack([at_least_float32(source) for source in sources], -2)
    return (weights_BTS.unsqueeze(-1) * stacked_BTSD).sum(-2).to(sources[0].dtype)
