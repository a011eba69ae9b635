"""Hook points: the modules whose outputs the outlier metrics are computed from."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.decoder_map import (
    DecoderMap,
    LayerMap,
    Part,
    SublayerMap,
    decoder_map,
    mlp_modules,
)


@dataclass(frozen=True, kw_only=True)
class HookPoint:
    """A module whose output is measured.

    Attributes:
        name: its path below the decoder (`layers.3.self_attn.o_proj`).
        kind: `layer`, `mlp`, `attention` (the output projection of a softmax attention), `mixer`
            (a linear attention or state-space module), `norm` or `final_norm`.
        layer: the index of the decoder layer; None for the final norm.
        module: the module.
        projects_heads: whether it is a projection of the heads' contexts; not in a family whose
            output projection was not found, or reads something else.
    """

    name: str
    kind: str
    layer: int | None
    module: nn.Module
    projects_heads: bool = False


def find_hook_points(model: PreTrainedModel) -> list[HookPoint]:
    """All hook points: each layer, its attention's output projection, its linear attention or
    state-space module, its MLP and its norms, and the final norm; each as far as the family has it.
    Most families have two norms in a layer, and four if branches also have a norm after them.

    Raises:
        UserError: a layer has neither a softmax attention nor another module that was found, or its
            attention cannot be measured.
    """
    return list(_hook_points(model.config.model_type, decoder_map(model)))


def attention_layers(points: Iterable[HookPoint]) -> dict[int, HookPoint]:
    """The hook points of softmax attention by layer; other layers have no attention map."""
    return {
        point.layer: point
        for point in points
        if point.kind == "attention" and point.layer is not None
    }


def check_output(model: PreTrainedModel, point: HookPoint, x: Any, ids_BT: Tensor) -> Tensor:
    """The output `x` of a module as one vector for each token, [B, T, D].

    Streams of the residual, [B, T, streams, D] or [streams, B, T, D], are concatenated.

    Raises:
        UserError: `x` has another shape.
    """
    tokens, shape = tuple(ids_BT.shape), tuple(x.shape) if isinstance(x, Tensor) else ()
    if shape[:2] == tokens or shape[:-1] == (ids_BT.numel(),):
        return x.reshape(*tokens, -1)
    if len(shape) == 4 and shape[1:3] == tokens:
        return x.movedim(0, 2).flatten(2)
    raise _refusal(
        model.config.model_type,
        f"the output of {point.name} is {list(shape) if shape else type(x).__name__}, not one"
        f" vector for each of {list(tokens)} tokens",
    )


def check_runs(model: PreTrainedModel, point: HookPoint, runs: int) -> None:
    """Raise `UserError` unless the module ran once in a forward pass, or more often as the norm of
    the last state and others."""
    if runs != 1 and not (runs and point.kind == "final_norm"):
        raise _refusal(
            model.config.model_type, f"{point.name} runs {runs} times in a forward pass, not once"
        )


def _hook_points(family: str, decoder: DecoderMap) -> Iterator[HookPoint]:
    def point(
        part: Part | LayerMap | SublayerMap, kind: str, layer: int | None = None, **heads: bool
    ) -> HookPoint:
        name = part.name.removeprefix(f"{decoder.name}.")
        return HookPoint(name=name, kind=kind, layer=layer, module=part.module, **heads)

    for index, layer in enumerate(decoder.layers):
        attention = layer.attention
        if attention is layer.mixer is layer.mlp is None:
            raise _refusal(family, f"the attention of {layer.name} was not found")
        yield point(layer, "layer", index)
        if attention is not None:
            heads = attention.output is not None
            yield point(attention.output or attention, "attention", index, projects_heads=heads)
        if layer.mixer is not None:
            yield point(layer.mixer, "mixer", index)
        yield from (point(mlp, "mlp", index) for mlp in _mlps(layer))
        yield from (point(norm, "norm", index) for norm in layer.norms)
    if decoder.final_norm is not None:
        yield point(decoder.final_norm, "final_norm")


def _mlps(layer: LayerMap) -> Iterable[Part]:
    """The MLPs of a layer.  If one adds the residual stream itself, its output projection."""
    if layer.mlp is None:
        return mlp_modules(layer)
    adds = "residual" in inspect.signature(layer.mlp.module.forward).parameters
    return [
        layer.mlp.output if adds and layer.mlp.output else Part(layer.mlp.name, layer.mlp.module)
    ]


def _refusal(family: str, reason: str) -> UserError:
    return UserError(f"model: family {family!r} cannot be diagnosed: {reason}")
