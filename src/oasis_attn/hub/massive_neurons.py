"""Prune the MLP neurons that write massive activations, once nulls do their work.

In a pretrained model, a few neurons of an early MLP write the massive activations of sink tokens
(Sun et al. 2024, arXiv 2402.17762; Yu et al. 2024, arXiv 2411.07191, call their weights super
weights).  Without them, the model has no sink and breaks.  A model with nulls from
`null_from_sink` has its sinks in the nulls, and may not need these neurons any more.

Axes: L layers; N windows, T tokens; D width, I neurons of an MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.hub.token_peaks import activation_size, batches, observe_peaks, token_peaks
from oasis_attn.modeling.decoder_map import decoder_map
from oasis_attn.ops.token_losses import token_losses

_MASSIVE = 5  # times the largest activation of the median token
_LOSS = 0.005  # nats that pruning may add to the mean loss
_TOKENS = 4096  # of the text that neurons are tried on, unless a window has more


class Neuron(NamedTuple):
    """A neuron of the MLP of a layer: one input of its output projection."""

    layer: int
    unit: int


class _Effect(NamedTuple):
    """What pruning must not increase, and what it must decrease."""

    loss: float
    first_size: float  # `activation_size` of tokens that run alone
    size: float  # `activation_size` of the windows


@torch.no_grad()
def prune_massive_neurons(
    model: PreTrainedModel,
    ids_NT: Tensor,
    neurons: int,
    *,
    on_try: Callable[[], None] = lambda: None,
) -> tuple[Neuron, ...]:
    """Switch off MLP neurons that write massive activations and are not needed, in place.

    A neuron is massive if its largest output is above five times the largest activation of the
    median token of its layer.  Massive neurons are tried one after the other, the largest first.
    One is pruned if `activation_size` decreases, also that of first tokens, and the mean next-token
    loss is at most .005 nats larger than before any was pruned; otherwise it is not tried again.
    At most `2 * neurons` are tried.

    The weights of the output projection that belong to a pruned neuron are 0 after it.  The weight
    is replaced, not overwritten, so that a model that shares it does not change.  Experts and
    fused or quantized projections have no such neurons.

    Args:
        model: a decoder with a head.
        ids_NT: windows of text, int64; the search uses at most 4,096 tokens, or one window.
        neurons: maximum number of neurons.
        on_try: is called before each neuron is tried.

    Returns:
        The neurons, in order.
    """
    if not neurons:
        return ()
    ids_NT = ids_NT[:: -(-ids_NT.numel() // _TOKENS)]
    projections = {
        layer: mlp.output.module
        for layer, each in enumerate(decoder_map(model).layers)
        if (mlp := each.mlp) and mlp.output and type(mlp.output.module) is nn.Linear
    }
    pruned: list[Neuron] = []
    needed: list[Neuron] = []
    latest = _effect(model, ids_NT)
    most = latest.loss + _LOSS
    while len(pruned) < neurons and len(pruned) + len(needed) < 2 * neurons:
        neuron = _largest(model, projections, ids_NT, {*pruned, *needed})
        if neuron is None:
            break
        on_try()
        projection = projections[neuron.layer]
        weight = projection.weight
        projection.weight = _pruned(projection, neuron.unit)
        effect = _effect(model, ids_NT)
        smaller = effect.size < latest.size and effect.first_size <= latest.first_size
        if smaller and effect.loss <= most:
            pruned.append(neuron)
            latest = effect
        else:
            projection.weight = weight
            needed.append(neuron)
    return tuple(pruned)


def _largest(
    model: PreTrainedModel,
    projections: dict[int, nn.Linear],
    ids_NT: Tensor,
    tried: set[Neuron],
) -> Neuron | None:
    """The massive neuron with the largest output that was not tried; None if there is no other."""
    inputs: dict[int, Tensor] = {}

    def see(layer: int, args: Any) -> None:
        x_I = args[0].detach().abs().flatten(0, -2).amax(0)
        inputs[layer] = torch.maximum(inputs.get(layer, x_I), x_I)

    with ExitStack() as stack:
        for layer, projection in projections.items():
            hook = projection.register_forward_pre_hook(lambda _m, args, i=layer: see(i, args))
            stack.callback(hook.remove)
        median_L = token_peaks(model, ids_NT).flatten(1).median(-1).values
    largest: tuple[float, Neuron] | None = None
    for layer, x_I in inputs.items():
        sizes_I = (x_I * projections[layer].weight.abs().amax(0)).float().cpu() / median_L[layer]
        sizes_I[[each.unit for each in tried if each.layer == layer]] = 0
        size, unit = (x.item() for x in sizes_I.max(0))
        if size > _MASSIVE and (largest is None or size > largest[0]):
            largest = size, Neuron(layer, int(unit))
    return largest and largest[1]


def _pruned(projection: nn.Linear, unit: int) -> nn.Parameter:
    weight_DI = projection.weight.detach().clone()
    weight_DI[:, unit] = 0
    return nn.Parameter(weight_DI, projection.weight.requires_grad)


def _effect(model: PreTrainedModel, ids_NT: Tensor) -> _Effect:
    with observe_peaks(model) as peaks:
        losses = [
            token_losses(model(input_ids=ids_BT, use_cache=False).logits, ids_BT).flatten()
            for ids_BT in batches(ids_NT.to(model.device))
        ]
    size = activation_size(torch.stack([torch.cat(series) for series in peaks]))
    first_size = activation_size(token_peaks(model, ids_NT.unique().unsqueeze(1)))
    return _Effect(float(torch.cat(losses).mean()), first_size, size)
