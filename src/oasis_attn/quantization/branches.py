"""The sublayers of a decoder as a transformation sees them: which linears read the residual stream,
which one writes to it, and from which rows the writer's input comes linearly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.families import Family, family_of

_READERS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    *("gate_proj", "up_proj", "gate_up_proj"),
)
_WRITERS = ("o_proj", "down_proj")
_INNER = (  # between readers and writer, on axes of their own
    *("q_norm", "k_norm", "query_layernorm", "key_layernorm", "sinks", "act_fn"),
    *("q_a_layernorm", "q_b_proj", "kv_a_layernorm", "kv_b_proj"),
)
_BESIDE = ("output_gate", "null_logit", "attn_res_sa", "attn_res_mlp")


class Source(NamedTuple):
    """Rows of a reader, from `start` on, that the writer's input is a linear function of.

    They are [groups, width], the writer's input [groups, repeats, width]: a value head serves all
    the query heads of its group.
    """

    linear: nn.Linear
    start: int
    groups: int
    repeats: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One sublayer.

    Attributes:
        norm: the norm before it; None in families that have none there.
        readers: the linears that read the norm's output, by name.
        writer: the linear whose output the branch is, by name; empty where there is none.
        source: where the writer's input comes from; None where that is not known to be linear.
        stranger: a parameter that is none of these; None if there is none, and the above is all.
    """

    norm: nn.Module | None
    readers: dict[str, nn.Linear]
    writer: dict[str, nn.Linear]
    source: Source | None
    stranger: str | None


def branches(model: PreTrainedModel) -> list[Branch]:
    """Attention and MLP of every layer in turn; `UserError` if the family has no adapter."""
    text = model.config.get_text_config()
    family = family_of(text)
    path, layers = decoder_layers(model)
    return [
        _branch(layer, f"{path}.{index}", family, part, text.num_attention_heads)
        for index, layer in enumerate(layers)
        for part in ("self_attn", family.mlp)
    ]


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers, and its name in the model.

    Raises:
        UserError: the family has no such list.
    """
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and name.endswith("layers"):
            return name, module
    raise UserError(f"model: family {model.config.model_type!r} has no list of {depth} layers")


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that holds the decoder layers, which `get_decoder` does not find in Llama 4."""
    return model.get_submodule(decoder_layers(model)[0].rpartition(".")[0])


def _branch(layer: nn.Module, path: str, family: Family, part: str, heads: int) -> Branch:
    attention = part == "self_attn"
    linears = {
        name: child
        for name, child in getattr(layer, part).named_children()
        if type(child) is nn.Linear and name in (*_READERS, *_WRITERS)
    }
    readers = {name: linears[name] for name in linears if name in _READERS}
    writer = {name: linears[name] for name in linears if name in _WRITERS}
    source = _value_rows(readers, writer, heads) if attention else _up_rows(readers, writer)
    norm = family.pre_attention if attention else family.pre_mlp
    named = {f"{path}.{part}.{name}": linear for name, linear in readers.items()}
    gate = getattr(layer, "output_gate", None)
    if attention and gate is not None:
        named[f"{path}.output_gate"] = gate
    return Branch(
        norm=getattr(layer, norm) if norm else None,
        readers=named,
        writer={f"{path}.{part}.{name}": linear for name, linear in writer.items()},
        source=source,
        stranger=next(
            (f"{path}.{name}" for name in _strangers(layer, family, part, linears)), None
        ),
    )


def _strangers(
    layer: nn.Module, family: Family, part: str, linears: dict[str, nn.Linear]
) -> Iterator[str]:
    """Parameters of the branch, or of none, whose part in the layer is not known."""
    norms = (family.pre_attention, family.post_attention, family.pre_mlp, family.post_mlp)
    for name, _ in layer.named_parameters():
        child, _, rest = name.partition(".")
        if child == part:
            if rest.partition(".")[0] not in (*linears, *_INNER):
                yield name
        elif child not in (*norms, *_BESIDE, "self_attn", family.mlp):
            yield name


def _value_rows(
    readers: dict[str, nn.Linear], writer: dict[str, nn.Linear], heads: int
) -> Source | None:
    """The value heads: all of `v_proj`, or the last rows of a fused projection."""
    values, out = readers.get("v_proj"), writer.get("o_proj")
    if out is None or out.in_features % heads:
        return None
    width = out.in_features // heads
    if values is not None:
        groups = values.out_features // width
        return Source(values, 0, groups, heads // groups, width)
    fused = readers.get("qkv_proj")
    if fused is None:
        return None
    groups = (fused.out_features // width - heads) // 2
    return Source(fused, (heads + groups) * width, groups, heads // groups, width)


def _up_rows(readers: dict[str, nn.Linear], writer: dict[str, nn.Linear]) -> Source | None:
    """The rows that a gate multiplies: all of `up_proj`, or the second half of a fused one."""
    down, fused = writer.get("down_proj"), readers.get("gate_up_proj")
    if down is None:
        return None
    if fused is not None:
        return Source(fused, down.in_features, 1, 1, down.in_features)
    if "gate_proj" in readers and "up_proj" in readers:
        return Source(readers["up_proj"], 0, 1, 1, down.in_features)
    return None


def gain_of(norm: nn.Module, width: int) -> tuple[Tensor, float] | None:
    """The gain of an RMSNorm, `[width]`, and the weight at which it is 1; None of any other norm.

    Some families multiply by the weight, some by 1 + weight: the norm itself is asked, by a probe.
    """
    if getattr(norm, "bias", None) is not None:
        return None
    weight = getattr(norm, "weight", None)
    if weight is None:
        weight = torch.ones(width)
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
    """`value` as a parameter of the dtype of `parameter`, to stand in its place."""
    return nn.Parameter(value.to(parameter.dtype).contiguous(), parameter.requires_grad)
