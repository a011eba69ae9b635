"""The largest activation of each token, with which the sinks of a model are found.

Axes: L layers; N windows, T tokens; D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.modeling.decoder_map import decoder_map

TOKENS_PER_PASS = 1024
"""Tokens that run at once, unless a window has more."""


def activation_size(peaks_LNT: Tensor) -> float:
    """The size of the largest activations, from the result of `token_peaks`.

    The geometric mean over layers of the power mean over windows of max |h|, with the exponent 4:
    between the mean, which one large window does not change, and the maximum, which sees no other.
    """
    largest_LN = peaks_LNT.amax(2).double()
    return float(largest_LN.pow(4).mean(1).pow(1 / 4).log().mean().exp())


@torch.no_grad()
def token_peaks(model: PreTrainedModel, ids_NT: Tensor) -> Tensor:
    """max |h| of each token over the channels of each layer's output, `[L, N, T]`, float32."""
    with observe_peaks(model) as peaks:
        for ids_BT in batches(ids_NT):
            run_text(model, ids_BT)
    return torch.stack([torch.cat(series) for series in peaks])


@contextmanager
def observe_peaks(model: PreTrainedModel) -> Iterator[list[list[Tensor]]]:
    """Collect max |h| of each token while `model` runs: for each layer, `[B, T]` of each pass."""
    peaks: list[list[Tensor]] = []
    with ExitStack() as stack:
        for layer in decoder_map(model).layers:
            series: list[Tensor] = []
            peaks.append(series)

            def see(_module: Any, _args: Any, output: Any, series: list[Tensor] = series) -> None:
                x_BTD = output[0] if isinstance(output, tuple) else output
                series.append(x_BTD.abs().amax(-1).float().cpu())

            stack.callback(layer.module.register_forward_hook(see).remove)
        yield peaks


def run_text(model: PreTrainedModel, ids_BT: Tensor, **arguments: Any) -> None:
    """Run the decoder without its head and without a cache."""
    model.base_model(input_ids=ids_BT.to(model.device), use_cache=False, **arguments)


def batches(ids_NT: Tensor) -> tuple[Tensor, ...]:
    """The windows, as many at a time as have `TOKENS_PER_PASS` tokens; at least one."""
    parts: tuple[Tensor, ...] = ids_NT.split(max(1, TOKENS_PER_PASS // ids_NT.shape[1]))
    return parts
