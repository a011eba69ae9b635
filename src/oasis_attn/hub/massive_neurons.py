"""Prune the MLP neurons that write massive activations, once nulls do their work.

In a pretrained model, a few neurons of an early MLP write the massive activations of sink tokens
(Sun et al. 2024, arXiv 2402.17762; Yu et al. 2024, arXiv 2411.07191, call their weights super
weights).  Without them, the model has no sink and breaks.  A model with nulls from
`null_from_sink` has its sinks in the nulls, and may not need these neurons any more.

Axes: L layers; N windows, B windows of a pass, T tokens; D width, I neurons of an MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.hub.token_peaks import activation_size, batches, observe_peaks, token_peaks
from oasis_attn.modeling.decoder_map import decoder_map
from oasis_attn.modeling.families import FAMILIES
from oasis_attn.ops.token_losses import token_losses

_MASSIVE = 5  # times the largest activation of the median token
_LOSS = 0.005  # nats that pruning may add to the mean loss
_TOKENS = 4096  # of the text that neurons are tried on, unless a window has more


class Neuron(NamedTuple):
    """A neuron of the MLP of a layer: one input of its output projection."""

    layer: int
    unit: int


class _Mlp(NamedTuple):
    """What is between the neurons of an MLP and the residual stream."""

    projection: nn.Linear
    norm: nn.Module | None
    multiplier: float


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
    median token of its layer.  The output is what the neuron adds to the residual stream: the norm
    and the multiplier that some families have after their MLPs are included.  Massive neurons are
    tried one after the other, the largest first.  One is pruned if `activation_size` decreases,
    also that of first tokens, and the mean next-token loss is at most .005 nats larger than before
    any was pruned; otherwise it is not tried again.  At most `2 * neurons` are tried; none
    without a finite loss, which windows of one token do not have.

    The weights of the output projection that belong to a pruned neuron are 0 after it.  The weight
    is replaced, not overwritten, so that a model that shares it does not change.  Experts and
    fused or quantized projections have no such neurons.

    Args:
        model: a decoder with a head, in eval mode.
        ids_NT: windows of text, int64; the search uses at most 4,096 tokens, or one window.
        neurons: maximum number of neurons.
        on_try: is called before each neuron is tried.

    Returns:
        The neurons, in order.
    """
    if not neurons:
        return ()
    ids_NT = ids_NT[:: -(-ids_NT.numel() // _TOKENS)]
    mlps = _mlps(model)
    pruned: list[Neuron] = []
    needed: list[Neuron] = []
    latest = _effect(model, ids_NT)
    if not math.isfinite(latest.loss):
        return ()
    most = latest.loss + _LOSS
    massive = _massive(model, mlps, ids_NT)
    while massive and len(pruned) < neurons and len(pruned) + len(needed) < 2 * neurons:
        neuron = massive.pop(0)
        on_try()
        projection = mlps[neuron.layer].projection
        weight = projection.weight
        projection.weight = _pruned(projection, neuron.unit)
        effect = _effect(model, ids_NT)
        smaller = effect.size < latest.size and effect.first_size <= latest.first_size
        if smaller and effect.loss <= most:
            pruned.append(neuron)
            latest = effect
            massive = [each for each in _massive(model, mlps, ids_NT) if each not in needed]
        else:
            projection.weight = weight
            needed.append(neuron)
    return tuple(pruned)


def _mlps(model: PreTrainedModel) -> dict[int, _Mlp]:
    """The MLPs that have neurons, by layer."""
    row = FAMILIES.get(model.config.get_text_config(decoder=True).model_type)
    multiplier = row.multiplier if row else None
    return {
        index: _Mlp(
            mlp.output.module,
            mlp.post_norm and mlp.post_norm.module,
            float(getattr(layer.module, multiplier)) if multiplier else 1.0,
        )
        for index, layer in enumerate(decoder_map(model).layers)
        if (mlp := layer.mlp)
        and mlp.output
        and type(mlp.output.module) is nn.Linear
        and type(mlp.output.module.weight) is nn.Parameter  # torchao replaces only the weight
    }


def _massive(model: PreTrainedModel, mlps: dict[int, _Mlp], ids_NT: Tensor) -> list[Neuron]:
    """The massive neurons, the largest first."""
    with ExitStack() as stack:
        outputs = {layer: _Outputs(mlp, stack) for layer, mlp in mlps.items()}
        median_L = token_peaks(model, ids_NT).flatten(1).median(-1).values
    found: list[tuple[float, Neuron]] = []
    for layer, each in outputs.items():
        sizes_I = each.sizes_I().cpu() / median_L[layer]
        units = (sizes_I > _MASSIVE).nonzero().flatten().tolist()
        found += [(-float(sizes_I[unit]), Neuron(layer, unit)) for unit in units]
    return [neuron for _, neuron in sorted(found)]


class _Outputs:
    """Observes the outputs of the neurons of an MLP while the model runs, until `stack` closes."""

    def __init__(self, mlp: _Mlp, stack: ExitStack) -> None:
        self._mlp = mlp
        self._inputs: list[Tensor] = []  # `[B * T, I]` of the pass that is running
        self._largest_I = mlp.projection.weight.new_zeros(mlp.projection.in_features).float()
        self._gain_D: Tensor | None = None
        stack.callback(mlp.projection.register_forward_hook(self._see).remove)
        if mlp.norm is not None:
            stack.callback(mlp.norm.register_forward_hook(self._see_norm).remove)

    def sizes_I(self) -> Tensor:
        """The largest output of each neuron."""
        weight_DI = self._mlp.projection.weight.float() * self._mlp.multiplier
        if self._gain_D is not None:
            weight_DI *= self._gain_D.unsqueeze(1)
        return self._largest_I * weight_DI.abs().amax(0)

    def _see(self, _module: Any, args: Any, _output: Any) -> None:
        x_TI = args[0].detach().flatten(0, -2).abs().float()
        if self._mlp.norm is None:
            self._add(x_TI)
        else:
            self._inputs.append(x_TI)

    def _see_norm(self, _module: Any, args: Any, output: Any) -> None:
        """The norm multiplies x by a scale of the token and a gain of the channel."""
        ratio_BTD = output.float() / args[0].float()
        ratio_TD = ratio_BTD.abs().nan_to_num(0, 0).flatten(0, -2)  # x may be 0
        scale_T = ratio_TD.norm(dim=1)
        self._gain_D = ratio_TD.norm(dim=0) / scale_T.norm()
        self._add(self._inputs.pop() * scale_T.unsqueeze(1))

    def _add(self, x_TI: Tensor) -> None:
        self._largest_I = self._largest_I.maximum(x_TI.amax(0))


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
