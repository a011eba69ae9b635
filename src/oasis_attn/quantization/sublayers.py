"""The sublayers of a decoder as weight transformations see them.

SmoothQuant and rotation need to know which linear layers read the residual stream, which one writes
to it, and which rows of a reader the input of the writer depends on linearly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from oasis_attn.modeling.decoder_map import (
    AttentionMap,
    DecoderMap,
    LayerMap,
    MlpMap,
    Part,
    is_part_of,
)


class Source(NamedTuple):
    """Rows of a reader, from `start` on, on which the writer's input depends linearly.

    The rows are [groups, width], and the writer's input is [groups, repeats, width]: one value head
    is used by all query heads of its group.  `null` is the layer whose `null_value` is another part
    of the input; None if there is no such value.  `gated` says whether a gate multiplies each entry
    of the input by its own factor; otherwise, the input of a rotated value head is rotated too.
    """

    linear: nn.Linear
    start: int
    groups: int
    repeats: int
    width: int
    gated: bool
    null: nn.Module | None = None


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """The attention or the MLP of one layer.

    Attributes:
        norm: the norm before it; None in families that have none there.
        readers: the linear layers that read the norm's output, by name.
        writer: the linear layer whose output is that of the sublayer, by name; empty if there is
            none.
        source: where the writer's input comes from; None if the dependence is not known to be
            linear.
        unknown_parameter: the name of a parameter of the layer whose use is not known; None if the
            use of all parameters is known.
    """

    norm: nn.Module | None
    readers: dict[str, nn.Linear]
    writer: dict[str, nn.Linear]
    source: Source | None
    unknown_parameter: str | None


def sublayers_of(decoder: DecoderMap, heads: int) -> list[Sublayer]:
    """The attention and the MLP of every layer in turn.

    Args:
        decoder: the map of a decoder whose family has a row.
        heads: its number of query heads.
    """
    return [
        _sublayer(layer, found, heads)
        for layer in decoder.layers
        for found in (layer.attention, layer.mlp)
        if found is not None
    ]


def _sublayer(layer: LayerMap, found: AttentionMap | MlpMap, heads: int) -> Sublayer:
    readers, writer = _plain(*found.inputs), _plain(found.output)
    known = (*readers, *writer, *found.inner)
    parameters = [f"{found.name}.{name}" for name, _ in found.module.named_parameters()]
    unknown = [name for name in parameters if not is_part_of(name, known)]
    source = None
    gate = getattr(layer.module, "output_gate", None)
    for linear in writer.values():
        if isinstance(found, AttentionMap):
            own = {part.name for part in (found.query, found.key, found.value) if part}
            gated = {part.name for part in found.inputs} != own or (
                gate is not None and gate.out_features > heads
            )
            source = _value_rows(_plain(found.value), linear, heads, gated)
            if source and getattr(layer.module, "null_value", None) is not None:
                source = source._replace(null=layer.module)
        else:
            source = _up_rows(found, linear)
    if isinstance(found, AttentionMap) and gate is not None:
        readers[f"{layer.name}.output_gate"] = gate
    return Sublayer(
        norm=found.pre_norm.module if found.pre_norm else None,
        readers=readers,
        writer=writer,
        source=source,
        unknown_parameter=next(iter([*unknown, *layer.unknown]), None),
    )


def _plain(*parts: Part | None) -> dict[str, nn.Linear]:
    """The modules that are `nn.Linear` and not a subclass, by name."""
    return {part.name: part.module for part in parts if part and type(part.module) is nn.Linear}


def _value_rows(
    values: dict[str, nn.Linear], writer: nn.Linear, heads: int, gated: bool
) -> Source | None:
    """The value heads: all of `v_proj`, or the last rows of a fused `qkv_proj`."""
    if writer.in_features % heads:
        return None
    width = writer.in_features // heads
    for name, linear in values.items():
        if name.endswith(".v_proj"):
            groups = linear.out_features // width
            return Source(linear, 0, groups, heads // groups, width, gated)
        if name.endswith(".qkv_proj"):
            groups = (linear.out_features // width - heads) // 2
            return Source(linear, (heads + groups) * width, groups, heads // groups, width, gated)
    return None


def _up_rows(mlp: MlpMap, writer: nn.Linear) -> Source | None:
    """The rows that are multiplied by a gate: all of `up`, or the second half if they are fused."""
    width = writer.in_features
    for linear in _plain(mlp.up if mlp.gate else None).values():
        return Source(linear, width if mlp.gate == mlp.up else 0, 1, 1, width, gated=True)
    return None


def gain_of(norm: nn.Module, width: int, device: torch.device) -> tuple[Tensor, float] | None:
    """The gain of an RMSNorm, `[width]` on its `device`, and the weight for which it is 1.

    None for other norms.  Some families multiply by the weight, others by 1 + weight; a test input
    shows which.
    """
    if getattr(norm, "bias", None) is not None:
        return None
    weight = getattr(norm, "weight", None)
    if weight is None:
        weight = torch.ones(width, device=device)
    probe = torch.linspace(0.5, 1.5, width, dtype=weight.dtype, device=weight.device)
    unit = probe / probe.square().mean().sqrt()
    with torch.no_grad():
        found = norm(probe[None])[0]
    for neutral in (1.0, 0.0):
        gain = weight.detach() + (1 - neutral)
        if torch.allclose(found, gain * unit, rtol=0.02, atol=0.02):
            return gain, neutral
    return None


def like(parameter: Tensor, value: Tensor) -> nn.Parameter:
    """`value` as a parameter with the dtype of `parameter`, which it replaces."""
    return nn.Parameter(value.to(parameter.dtype).contiguous(), parameter.requires_grad)
