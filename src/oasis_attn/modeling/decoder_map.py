"""Where the parts of a decoder are: its layers, attention, MLPs, norms, projections and head.

`decoder_map` works for models of this library, decoders of transformers, the text decoder in a
vision-language model, and models wrapped by PEFT.  Diagnosis, quantization and prefix tokens find
modules here and nowhere else.

A family with a row in `families.py` has its norms and its MLP where the row says.  Everything else,
and every family without a row, is found by one heuristic:

- Layers: the only list of `num_hidden_layers` modules that belongs directly to a model with the
  text configuration.
- Attention: the only child of a layer whose class is called "Attention", unless its class is that
  of a linear or a cross-attention.  Linear attention and state-space modules are the `mixer`.
- MLP: the only child that has a usual name (`MLP_NAMES`) or a class called MLP, MoE or FFN.  In
  layers that have `fc1` and `fc2` themselves, it is `fc2`.
- Norms: children whose class is called "Norm".  Their roles are those of a row with the same norms.
  If there is none: of two norms, the first is before the attention and the second before the MLP;
  a single norm is before both (parallel branches).
- Projections: by their usual names.

What was not found, or is ambiguous, is None; parameters whose role is not known are `unknown`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.families import DEPARTURES, FAMILIES, Family

MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
_MLP_CLASS = re.compile(r"(MLP|Mlp|M[oO][eE]|FeedForward|FFN)(Block|Layer)?$")
_SOFTMAX_CLASS = re.compile(r"^(?!.*(Delta|Lightning|Rwkv|Cross|Residual)).*Attention")
_MIXER_CLASS = re.compile(
    r"(Delta|Lightning|Rwkv|Cross).*Attention|DeltaNet|Mixer|MambaLayer|MambaDecoderLayer|ShortConv$"
    r"|RecurrentBlock|xLSTMLayer"
)
_CROSS_ATTENTION = re.compile(r"(^|\.)(encoder_attn|cross_?att)")
_NORM_CLASS = re.compile("Norm")
_ROUTER = re.compile(r"(^|\.)(shared_expert_gate|gate(\.wg)?|router(\.\w+)?)$")

_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
_QUERY = ("q_proj", "q_a_proj", *_FUSED)
_KEY = ("k_proj", "kv_a_proj_with_mqa", *_FUSED)
_VALUE = ("v_proj", "kv_a_proj_with_mqa", *_FUSED)
_ATTENTION_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")
_GATE = ("gate_proj", "gate_up_proj", "w1")
_UP = ("up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "w3")
_MLP_OUTPUT = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2")
_INNER = (
    *("q_norm", "k_norm", "query_layernorm", "key_layernorm", "sinks", "act_fn"),
    *("q_a_layernorm", "q_b_proj", "kv_a_layernorm", "kv_b_proj"),
)
_OURS = ("output_gate", "null_logit", "null_key", "null_value", "attn_res_sa", "attn_res_mlp")


class Part(NamedTuple):
    """A module and its name in the model."""

    name: str
    module: nn.Module


@dataclass(frozen=True, kw_only=True)
class SublayerMap:
    """The attention or the MLP of one layer.

    Attributes:
        name: the module's name in the model.
        module: the module whose output, after `post_norm`, is added to the residual stream.
        pre_norm: the norm before the module.
        post_norm: the norm between the module and the residual stream.
        inputs: the projections that read the sublayer's input, each of them once.
        output: the projection whose output is that of the module.
        inner: names of parts between inputs and output that do not see the residual stream: norms
            of queries and keys, sinks, the second projections of latent attention.
    """

    name: str
    module: nn.Module
    pre_norm: Part | None
    post_norm: Part | None
    inputs: tuple[Part, ...]
    output: Part | None
    inner: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AttentionMap(SublayerMap):
    """A softmax attention.

    Attributes:
        query, key, value: projections in `inputs`.  One module may be several of them: a fused
            projection, or the first key and value projection of latent attention.
    """

    query: Part | None
    key: Part | None
    value: Part | None


@dataclass(frozen=True, kw_only=True)
class MlpMap(SublayerMap):
    """A dense MLP or a mixture of experts.

    Attributes:
        gate, up: projections in `inputs`; one module if they are fused.
        routers: the modules that choose or weight experts.
        experts: the module that contains all routed experts.
    """

    gate: Part | None
    up: Part | None
    routers: tuple[Part, ...]
    experts: Part | None


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """One decoder layer.

    Attributes:
        name: the layer's name in the model.
        module: the layer.
        attention: its softmax attention; None in a layer of linear attention or state space.
        mixer: its linear attention or state-space module.
        mlp: its MLP.
        norms: all norms that are direct children, in the module's order.
        unknown: names of the parameters that belong to none of these or of this library's parts.
    """

    name: str
    module: nn.Module
    attention: AttentionMap | None
    mixer: Part | None
    mlp: MlpMap | None
    norms: tuple[Part, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DecoderMap:
    """A decoder.

    Attributes:
        name: the decoder's name in the model; empty if it is the model itself.
        module: the decoder, which has no head.
        has_row: whether `FAMILIES` has a row for it, so that the roles of all norms are certain.
        layers: its layers in order.
        embedding: the token embedding.
        final_norm: the norm after the last layer.
        final_norm_reads_embedding: whether `FAMILIES` says that it also normalizes the embedding.
        head: the output layer; None in a model without one.
        unknown: names of the parameters of the model that belong to none of these.
    """

    name: str
    module: nn.Module
    has_row: bool
    layers: tuple[LayerMap, ...]
    embedding: Part | None
    final_norm: Part | None
    final_norm_reads_embedding: bool
    head: Part | None
    unknown: tuple[str, ...]


def decoder_map(model: PreTrainedModel) -> DecoderMap:
    """Map the text decoder of `model`.

    Raises:
        UserError: the list of its layers was not found.
    """
    path, layers = find_layers(model)
    decoder = find_decoder(model)
    text = model.config.get_text_config(decoder=True)
    parallel = getattr(text, "use_parallel_residual", False)
    row = None if parallel else FAMILIES.get(text.model_type)
    departure = DEPARTURES.get(text.model_type)
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = (
        Part(names[id(module)], module) if module is not None else None
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    norms = _children(decoder, _NORM_CLASS)
    # Some decoders have another norm: of the embedding, or of what every layer reads.
    final = [norm for norm in norms if norm.name == _join(decoder.name, "norm")] or norms
    final_norm = final[-1] if final else None
    found = [layers, *(part.module for part in (embedding, final_norm, head) if part)]
    known = {id(parameter) for module in found for parameter in module.parameters()}
    return DecoderMap(
        name=decoder.name,
        module=decoder.module,
        has_row=row is not None,
        layers=tuple(
            _map_layer(Part(f"{path}.{index}", layer), row or departure)
            for index, layer in enumerate(layers)
        ),
        embedding=embedding,
        final_norm=final_norm,
        final_norm_reads_embedding=row is not None and row.final_norm_reads_embedding,
        head=head,
        unknown=tuple(name for name, p in model.named_parameters() if id(p) not in known),
    )


def find_decoder(model: PreTrainedModel) -> Part:
    """The text decoder of `model`: the module that contains its layers, without a head.

    Raises:
        UserError: the list of its layers was not found.
    """
    name = find_layers(model)[0].rpartition(".")[0]
    return Part(name, model.get_submodule(name))


def mlp_modules(layer: Part | LayerMap) -> tuple[Part, ...]:
    """The children of a layer that are MLPs by name or class; several if it adds their outputs."""
    part = Part(layer.name, layer.module)
    return _unique(*_named(part, MLP_NAMES), *_children(part, _MLP_CLASS))


def output_projection_name(attention: nn.Module) -> str | None:
    """The name, inside an attention module, of the projection whose output is the module's."""
    depth = {  # In some families, the projection is inside a module of the attention.
        name: name.count(".")
        for name, _ in attention.named_modules()
        if name.rpartition(".")[2] in _ATTENTION_OUTPUT
    }
    outputs = [name for name in depth if depth[name] == min(depth.values())]
    return outputs[0] if len(outputs) == 1 else None


def is_cross_attention(name: str) -> bool:
    """Whether a module of this name is an attention to an encoder's output, or inside one."""
    return _CROSS_ATTENTION.search(name) is not None


def is_router(name: str) -> bool:
    """Whether a module of this name chooses or weights experts."""
    return _ROUTER.search(name) is not None


def is_part_of(name: str, parents: Iterable[str]) -> bool:
    """Whether a parameter or module is one of `parents` or inside one."""
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path of the list of the decoder's layers, and the list; cheaper than `decoder_map`.

    Raises:
        UserError: it was not found.
    """
    text = model.config.get_text_config(decoder=True)
    depth = getattr(text, "num_hidden_layers", None)
    if depth is None:
        raise UserError(
            f"model: the configuration of family {text.model_type!r} has no num_hidden_layers"
        )
    found = [
        (_join(name, child_name), child)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and module.config.model_type == text.model_type
        for child_name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if len(found) != 1:
        raise UserError(
            f"model: family {model.config.model_type!r} is not supported: {len(found)} modules look"
            f" like its list of {depth} layers"
        )
    return found[0]


def _map_layer(layer: Part, row: Family | None) -> LayerMap:
    norms = [part for part in _children(layer, _NORM_CLASS) if not is_cross_attention(part.name)]
    attentions = _children(layer, _SOFTMAX_CLASS)
    attention = _only([part for part in attentions if not is_cross_attention(part.name)])
    mixer = _only(_children(layer, _MIXER_CLASS))
    mlps = _unique(*_named(layer, (row.mlp,))) if row else mlp_modules(layer)
    mlp = _only(mlps) or (_child(layer, ("fc2",)) if _child(layer, ("fc1",)) else None)
    pre_attention, post_attention, pre_mlp, post_mlp = _norm_roles(norms, row)
    parts = [part.name for part in (attention, mixer, mlp, *norms) if part]
    known = (*parts, *(_join(layer.name, name) for name in (*_OURS, "fc1", "fc2")))
    return LayerMap(
        name=layer.name,
        module=layer.module,
        attention=attention and _map_attention(attention, pre_attention, post_attention),
        mixer=mixer,
        mlp=mlp and _map_mlp(layer, mlp, pre_mlp, post_mlp),
        norms=tuple(norms),
        unknown=tuple(
            name
            for name in (_join(layer.name, own) for own, _ in layer.module.named_parameters())
            if not is_part_of(name, known)
        ),
    )


def _norm_roles(norms: list[Part], row: Family | None) -> list[Part | None]:
    """The norms before and after attention, then before and after the MLP."""
    by_name = {norm.name.rpartition(".")[2]: norm for norm in norms}
    rows = FAMILIES.values()
    row = row or next((known for known in rows if {*known.norms} - {None} == {*by_name}), None)
    if row is not None:
        return [by_name.get(name or "") for name in row.norms]
    if 1 <= len(norms) <= 2:
        return [norms[0], None, norms[-1], None]
    return [None] * 4


def _map_attention(part: Part, pre_norm: Part | None, post_norm: Part | None) -> AttentionMap:
    query, key, value, gate = (_child(part, names) for names in (_QUERY, _KEY, _VALUE, _GATE))
    at = output_projection_name(part.module)
    output = None if at is None else Part(_join(part.name, at), part.module.get_submodule(at))
    return AttentionMap(
        name=part.name,
        module=part.module,
        pre_norm=pre_norm,
        post_norm=post_norm,
        inputs=_unique(query, key, value, gate),
        output=output,
        inner=tuple(_join(part.name, name) for name in _INNER),
        query=query,
        key=key,
        value=value,
    )


def _map_mlp(layer: Part, part: Part, pre_norm: Part | None, post_norm: Part | None) -> MlpMap:
    inside = layer if part.name.endswith(".fc2") else part
    gate, up = _child(inside, _GATE), _child(inside, _UP)
    return MlpMap(
        name=part.name,
        module=part.module,
        pre_norm=pre_norm,
        post_norm=post_norm,
        inputs=_unique(gate, up),
        output=_child(inside, _MLP_OUTPUT),
        inner=tuple(_join(part.name, name) for name in _INNER),
        gate=gate,
        up=up,
        routers=tuple(
            Part(_join(part.name, name), module)
            for name, module in part.module.named_modules()
            if is_router(name)
        ),
        experts=_child(part, ("experts",)),
    )


def _children(parent: Part, kind: re.Pattern[str]) -> list[Part]:
    return [
        Part(_join(parent.name, name), child)
        for name, child in parent.module.named_children()
        if kind.search(type(child).__name__)
    ]


def _child(parent: Part, names: Iterable[str]) -> Part | None:
    """The only child that has one of `names`."""
    return _only(_named(parent, names))


def _named(parent: Part, names: Iterable[str]) -> list[Part]:
    children = dict(parent.module.named_children())
    return [Part(_join(parent.name, name), children[name]) for name in names if name in children]


def _only(found: Sequence[Part]) -> Part | None:
    return found[0] if len(found) == 1 else None


def _unique(*parts: Part | None) -> tuple[Part, ...]:
    return tuple({part.name: part for part in parts if part}.values())


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
