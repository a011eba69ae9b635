"""Turn a null with keys and values into a plain null, a logit per head, during training.

A null whose key and value are those of a pretrained model's first token takes over its sink
(`oasis convert --null-from-sink`).  The plain null has value 0, and the same logit c for every
query.
Over N steps, with f falling linearly from 1 to 0,

    key = f key_0        value = f value_0        c = f c_0 + (1 - f) mean(logit of the null)

and the output projection gets a bias, to which (1 - f) times the mean of what the null adds to the
output of attention is added.  The means are over tokens of the training corpus, in the initial
model.  Keys and values are not trained; c, the bias and all other weights are.

Axes: B batch, H heads, T tokens, M nulls, D width.
"""
# ruff: noqa: ARG002  the signatures are TrainerCallback's

from __future__ import annotations

import copy
import math
from collections import defaultdict
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from oasis_attn.errors import UserError
from oasis_attn.hub.model_info import eval_mode
from oasis_attn.modeling.attention import AttentionCall, observe_attention
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.layer import OUTPUT_BIAS, RoutedLayer
from oasis_attn.ops.normalizers import LEARNED_NULL_VALUE

PLAIN = "learned_sink"
"""The normalizer at the end."""


class _Layer(NamedTuple):
    """The parameters of a layer that change, and how.

    Attributes:
        shrinking: keys and values of nulls, and their values at the start.
        growing: the logit of the null and the output bias, and what is added to each in all.
    """

    shrinking: list[tuple[nn.Parameter, Tensor]]
    growing: list[tuple[nn.Parameter, Tensor]]


class NullToLogit(TrainerCallback):
    """Shrinks keys and values of nulls linearly to 0 over `steps` steps; the last trains at 0.

    The factor depends only on the step.  The learned parts, the logit and the bias, grow by equal
    amounts at each of these steps, so that a checkpoint contains them.  `text_config` gets
    `attention_output_bias`, if the family has no such bias; `finish` makes the model one with a
    plain null.

    Args:
        model: an OASIS model whose null has a value, with the weights that the run starts from,
            also if it is resumed.
        steps: number of steps.
        batches: int64 token ids, each `[B, T]`, on which the means are measured.

    Attributes:
        factor: f of the current step.

    Raises:
        UserError: the null of the model has no value, or attention has no linear output projection.
    """

    def __init__(self, model: PreTrainedModel, steps: int, batches: list[Tensor]):
        config: Any = model.config
        name = config.normalizer.name if isinstance(config, OasisConfig) else "softmax"
        if name not in LEARNED_NULL_VALUE:
            raise UserError(
                f"null_to_logit: {steps} steps require a model with a token_normalizer of"
                f" {' or '.join(map(repr, LEARNED_NULL_VALUE))}, but it has {name!r}"
            )
        layers = routed_layers(model)
        if any(layer.null_logit is None for layer in layers):
            raise UserError(
                f"null_to_logit: the null of {config.text_config.model_type!r} is its own sink"
            )
        for layer in layers:
            if layer.output_projection.bias is None:
                layer.add_output_bias()
                setattr(config.text_config, OUTPUT_BIAS, True)
        self.steps, self.factor = steps, 1.0
        self._layers = [
            _changes(layer, *means)
            for layer, means in zip(layers, _means(model, batches), strict=True)
        ]

    def at(self, step: int) -> float:
        """The factor of step `step`, which counts from 0; 1 before the first."""
        return max(1 - (step + 1) / self.steps, 0.0)

    def freeze(self) -> None:
        """Exclude the keys and values from training."""
        for layer in self._layers:
            for parameter, _ in layer.shrinking:
                parameter.requires_grad_(False)

    @torch.no_grad()
    def on_step_begin(self, args, state, control, **kwargs):
        step = state.global_step
        self.factor = self.at(step)
        share = self.at(step - 1) - self.factor
        for layer in self._layers:
            for parameter, start in layer.shrinking:
                parameter.copy_(start * self.factor)
            for parameter, growth in layer.growing:
                parameter.add_((growth * share).to(parameter))


def _changes(layer: RoutedLayer, logit_H: Tensor, output_D: Tensor) -> _Layer:
    found = (layer.null_key, layer.null_value)
    bias, logit = layer.output_projection.bias, layer.null_logit
    assert logit is not None
    return _Layer(
        shrinking=[(x, x.detach().clone()) for x in found if x is not None],
        growing=[(logit, logit_H - logit.detach().double()), (bias, output_D)],
    )


def finish(model: PreTrainedModel) -> None:
    """Make a model whose null keys and values are 0 one with a plain null, which computes the same.

    M nulls with logit c are one null with logit c + log M.

    Raises:
        UserError: a key or a value is not 0.
    """
    for layer in routed_layers(model):
        for part in ("null_key", "null_value"):
            parameter = getattr(layer, part)
            if parameter is not None and parameter.any():
                raise UserError(f"null_to_logit: {part} of layer {layer.index} is not 0")
            setattr(layer, part, None)
        assert layer.null_logit is not None
        layer.null_logit.data.add_(math.log(_nulls(model)))
    model.config.token_normalizer = PLAIN


def routed_layers(model: PreTrainedModel) -> list[RoutedLayer]:
    """The layers of an OASIS model."""
    return [module for module in model.modules() if isinstance(module, RoutedLayer)]


def _means(model: PreTrainedModel, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each layer: the mean logit of a null, `[H]`, and of what its values add to the output of
    attention, `[D]`.

    Of M nulls, the logit is their log-sum-exp minus log M.  Each attention runs a second time
    without the values, because some families gate or normalize what the projection reads.
    """
    logits: dict[int, list[Tensor]] = defaultdict(list)
    outputs: dict[int, list[Tensor]] = defaultdict(list)
    without: dict[int, list[Tensor]] = defaultdict(list)

    def observe(call: AttentionCall) -> None:
        logits[call.layer].append(call.null_logit_BHT.double().mean((0, 2)))  # equal in both runs

    def run_without(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache = copy.deepcopy(kwargs.get("past_key_values"))  # of a prefix; attention adds to it
        changed = kwargs | {"null_value": None, "past_key_values": cache}
        add(without, module, module.forward(*args, **changed))

    def add(means: dict[int, list[Tensor]], module: Any, output: tuple[Tensor, Any]) -> None:
        means[module.layer_idx].append(output[0].double().mean((0, 1)))

    with eval_mode(model), torch.no_grad(), ExitStack() as stack:
        stack.enter_context(observe_attention(model, observe))
        for layer in routed_layers(model):
            attention = layer.self_attn
            before = attention.register_forward_pre_hook(run_without, with_kwargs=True)
            after = attention.register_forward_hook(lambda x, _, output: add(outputs, x, output))
            stack.callback(before.remove)
            stack.callback(after.remove)
        for ids_BT in batches:
            model.base_model(input_ids=ids_BT, use_cache=False)
    several = math.log(_nulls(model))
    results = []
    for index in sorted(logits):
        logit_H, output_D, without_D = (
            torch.stack(found[index]).mean(0) for found in (logits, outputs, without)
        )
        results.append((logit_H - several, output_D - without_D))
    return results


def _nulls(model: PreTrainedModel) -> int:
    config: Any = model.config
    return int(config.normalizer.arguments.get("nulls", 1))
