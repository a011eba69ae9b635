"""Hook points: the modules whose outputs the outlier metrics are computed from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.decoder_map import DecoderMap, LayerMap, Part, SublayerMap, decoder_map

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class HookPoint:
    """A module whose output is measured.

    Attributes:
        name: its path below the decoder (`layers.3.self_attn.o_proj`).
        kind: `layer`, `mlp`, `attention` (the output projection), `norm` or `final_norm`.
        layer: the index of the decoder layer; None for the final norm.
        module: the module.
    """

    name: str
    kind: str
    layer: int | None
    module: nn.Module


def find_hook_points(model: PreTrainedModel) -> list[HookPoint]:
    """All hook points: each layer, its attention's output projection, its MLP and its norms (two in
    most families, four if branches also have a norm after them), and the final norm.

    Raises:
        UserError: one of these modules was not found.
    """
    return list(_hook_points(model.config.model_type, decoder_map(model)))


def check_output(model: PreTrainedModel, point: HookPoint, x: Any, ids_BT: Tensor) -> None:
    """Raise `UserError` unless `x` has one vector per token: [B, T, D] or [B * T, D]."""
    tokens = tuple(ids_BT.shape)
    if not isinstance(x, Tensor) or tuple(x.shape[:-1]) not in (tokens, (ids_BT.numel(),)):
        shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise _refusal(
            model.config.model_type,
            f"the output of {point.name} is {shape}, not one vector for each of {list(tokens)}"
            " tokens",
        )


def _hook_points(family: str, decoder: DecoderMap) -> Iterator[HookPoint]:
    def found(part: T | None, what: str) -> T:
        if part is None:
            raise _refusal(family, f"{what} was not found")
        return part

    def point(part: Part | LayerMap | SublayerMap, kind: str, layer: int | None) -> HookPoint:
        name = part.name.removeprefix(f"{decoder.name}.")
        return HookPoint(name=name, kind=kind, layer=layer, module=part.module)

    for index, layer in enumerate(decoder.layers):
        if layer.attention is None and layer.mixer is not None:
            mixer = type(layer.mixer.module).__name__
            raise _refusal(family, f"{layer.name} has no softmax attention, but a {mixer}")
        attention = found(layer.attention, f"the attention of {layer.name}")
        projection = found(attention.output, f"the output projection of {attention.name}")
        mlp = found(layer.mlp, f"the MLP of {layer.name}")
        yield point(layer, "layer", index)
        yield point(projection, "attention", index)
        yield point(mlp, "mlp", index)
        yield from (point(norm, "norm", index) for norm in layer.norms)
    yield point(found(decoder.final_norm, "the final norm"), "final_norm", None)


def _refusal(family: str, reason: str) -> UserError:
    return UserError(f"model: family {family!r} cannot be diagnosed: {reason}")
