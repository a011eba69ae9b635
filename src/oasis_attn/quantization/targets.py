"""What a scheme quantizes in a model, by exact name, and the hooks that quantize it.

A linear layer has the name that it has in the model, or, if it belongs to an expert, the one that
it has after `linearize`; its weight and its input are quantized.  Every other target is
`module:tensor`, where tensor is `input` or `output`, or, of an attention module, `probabilities` or
`context` (the weighted sum of values, before any gate).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.attention import AttentionCall, oasis_attention
from oasis_attn.modeling.configuration_oasis import ATTENTION, OasisConfig
from oasis_attn.modeling.decoder_map import (
    DecoderMap,
    SublayerMap,
    decoder_map,
    find_decoder,
    find_layers,
    is_cross_attention,
    is_part_of,
    is_router,
)
from oasis_attn.modeling.hf_compat import (
    attention_implementation,
    sdpa_mask,
    set_attention_implementation,
    supports_boolean_masks,
    uses_attention_interface,
)
from oasis_attn.ops.null_attention import naive_mix
from oasis_attn.quantization.linearize import linear_names
from oasis_attn.quantization.quantizers import StaticQuantizer
from oasis_attn.quantization.residual_sums import find_sums
from oasis_attn.quantization.schemes import Scheme

QUANTIZED_ATTENTION = "oasis-quantized"
# Parts of this library that stay in floating point: they are small, and sensitive to errors.
_OURS_IN_FLOAT = re.compile(r"\.output_gate$|\.attn_res_")


def linear_targets(model: PreTrainedModel, *, head: bool = False) -> tuple[str, ...]:
    """Names of the linear layers that a scheme quantizes by default, in the model's order.

    These are all linear layers, among them those of experts and `Conv1D`, except: gates on the
    outputs of attention and of shared experts, routers of experts and over depth, Mamba's
    `dt_proj`, attention to an encoder's output, and the output head unless `head` is True.  Of a
    model that wraps a text decoder, such as a vision-language model, these are the layers of the
    decoder.  `coverage` lists other weights that are not quantized, such as embeddings and modules
    of classes that `linearize` does not know.
    """
    output = model.get_output_embeddings()
    outputs = {name for name, module in model.named_modules() if module is output}
    decoder = _wrapped_decoder(model)
    return tuple(
        name
        for name in linear_names(model)
        if (head if name in outputs else not decoder or is_part_of(name, [decoder]))
        and not is_router(name)
        and not is_cross_attention(name)
        and not _OURS_IN_FLOAT.search(name)
    )


def _wrapped_decoder(model: PreTrainedModel) -> str:
    """The name of the text decoder in a model that wraps one; empty for other models."""
    config = model.config
    wraps = config.get_text_config(decoder=True).model_type != config.model_type
    return find_decoder(model).name if wraps and not isinstance(config, OasisConfig) else ""


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The `nn.Linear` modules in `linear_targets`; after `linearize`, these are all of them."""
    targets = set(linear_targets(model))
    return {
        name: module
        for name, module in model.named_modules()
        if name in targets and isinstance(module, nn.Linear)
    }


def tensor_targets(model: PreTrainedModel) -> tuple[str, ...]:
    """The tensors between the linear layers of a decoder, layer by layer.

    These are the probabilities and the context of attention, the outputs of all norms except those
    inside attention and MLP (such as norms of queries and keys), and the residual stream wherever a
    module reads it: the `input` of each layer (of the first one, the embedding), the sum after its
    attention, and the input of the final norm.  The next sum is computed from the quantized stream.

    With depth routing, the stream is the mix that a sublayer reads (in the authors' form, the
    state), and the outputs of attention and MLP, which are the sources of the mix, are quantized
    too; in the block form, these are the members of a block.  Scores and weights over depth, null
    logits and null probabilities stay in floating point: they are a few numbers per token, and no
    integer kernel computes them.

    A family without a row in `modeling.families` runs on a few tokens, to see what is added to its
    residual stream (`find_sums`).  In its layers of linear attention or state space, what these
    compute between their linear layers stays in floating point.

    Raises:
        UserError: the residual stream is not the sum of the outputs of sublayers, the attention of
            the family does not use the attention interface of transformers, or its final norm also
            reads the embedding.
    """
    decoder = decoder_map(model)
    sums = _readers_of_sums(model, decoder)
    routed = getattr(model.config, "residual", "sum") != "sum"
    found: list[str] = []

    def branch_output(sublayer: SublayerMap) -> list[str]:
        if sublayer.post_norm or routed:
            return [f"{(sublayer.post_norm or sublayer).name}:output"]
        return []

    for layer, reader in zip(decoder.layers, sums, strict=True):
        attention, mlp = layer.attention, layer.mlp
        found.append(f"{layer.name}:input")
        if attention:
            if attention.pre_norm:
                found.append(f"{attention.pre_norm.name}:output")
            found += [f"{attention.name}:probabilities", f"{attention.name}:context"]
            found += branch_output(attention)
        if reader:
            found.append(f"{reader}:input")
        if mlp and mlp.pre_norm:
            found.append(f"{mlp.pre_norm.name}:output")
        found += branch_output(mlp) if mlp else []
        if not decoder.has_row:
            found += [f"{norm.name}:output" for norm in layer.norms]
    assert decoder.final_norm is not None
    found += [f"{decoder.final_norm.name}:input", f"{decoder.final_norm.name}:output"]
    return tuple(dict.fromkeys(found))


def _readers_of_sums(model: PreTrainedModel, decoder: DecoderMap) -> list[str]:
    """For each layer, the module that reads the sum after attention; empty if there is no sum."""
    reads_embedding = decoder.final_norm_reads_embedding
    if decoder.has_row and not reads_embedding:
        return [(each.mlp.pre_norm or each.mlp).name for each in decoder.layers if each.mlp]
    module: Any = decoder.module
    attention = [layer.attention.module for layer in decoder.layers if layer.attention]
    usable = uses_attention_interface(module) and supports_boolean_masks(module)
    if attention and not (usable and all(hasattr(each, "config") for each in attention)):
        reason = (
            "its attention does not use the attention interface of transformers with SDPA masks"
        )
    elif reads_embedding:
        reason = "its final norm reads the embedding too, and both would share one range"
    elif decoder.final_norm is None:
        reason = "its final norm was not found"
    elif (sums := find_sums(model, decoder)) is None:
        reason = "its layers do not add just the outputs of their sublayers to the residual stream"
        if model.dtype.itemsize < 4:
            reason += f", as far as {model.dtype} shows it (load the model in float32)"
    else:
        return sums
    family = model.config.get_text_config(decoder=True).model_type
    raise UserError(
        f"targets: 'full' is not possible with family {family!r}: {reason}; use 'linear'"
    )


def add_quantizer(model: PreTrainedModel, target: str, scheme: Scheme) -> StaticQuantizer:
    """Quantize one of `tensor_targets(model)`; the module `<module>.<tensor>_quantizer` does it."""
    name, _, tensor = target.partition(":")
    module: Any = model.get_submodule(name)
    assert scheme.activation is not None
    quantizer = StaticQuantizer(scheme.activation, observer=scheme.observer, name=target)
    module.add_module(f"{tensor}_quantizer", quantizer)
    if tensor == "output":
        module.register_forward_hook(_quantize_output)
    elif tensor == "input":
        routed = isinstance(model.config, OasisConfig) and model.config.residual == "depth"
        layer = name.rpartition(".")[0]
        in_layer = layer.rpartition(".")[0] == find_layers(model)[0]
        # Inside a layer, the sum that the MLP's norm reads is also what the MLP's output is added
        # to: both must get the quantized values.
        hook = _overwrite_input if in_layer and not routed else _quantize_input
        module.register_forward_pre_hook(hook)
    elif attention_implementation(module.config) != QUANTIZED_ATTENTION:
        if attention_implementation(model.config) != ATTENTION:
            model.set_attn_implementation(ATTENTION)
        # A separate config: `set_attn_implementation` on the model does not change it.
        module.config = copy.copy(module.config)
        set_attention_implementation(module.config, QUANTIZED_ATTENTION)
    return quantizer


# Module-level functions that find the quantizer on the module, so that a copied model uses its own.


def _first(value: Any, quantizer: Callable[[Tensor], Tensor]) -> Any:
    """`value`, a tensor or a tuple that starts with one, with this tensor quantized."""
    if isinstance(value, Tensor):
        return quantizer(value)
    return (quantizer(value[0]), *value[1:])


def _quantize_output(module: nn.Module, _args: Any, output: Any) -> Any:
    return _first(output, cast(StaticQuantizer, module.output_quantizer))


def _quantize_input(module: nn.Module, args: tuple[Any, ...]) -> Any:
    return _first(args[0], cast(StaticQuantizer, module.input_quantizer)), *args[1:]


def _overwrite_input(module: nn.Module, args: tuple[Any, ...]) -> None:
    quantized = cast(StaticQuantizer, module.input_quantizer)(args[0])
    if quantized is not args[0]:
        args[0].copy_(quantized)


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    output_gate: Tensor | None = None,
    map_observer: Callable[[AttentionCall], None] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`oasis_attention` with quantized probabilities and context; it computes the whole map."""
    calls: list[AttentionCall] = []
    kwargs["map_observer"] = calls.append
    _, null_BHT = oasis_attention(module, query, key, value, attention_mask, **kwargs)
    (call,) = calls
    if map_observer is not None:
        map_observer(call)
    assert call.weights_BHTS is not None  # for a map observer it is computed
    context_BHTd = naive_mix(
        _quantizer(module, "probabilities")(call.weights_BHTS),
        call.value_BGSd,
        kwargs.get("dropout", 0.0),
        call.null_output_BHTd,
    )
    context_BHTd = _quantizer(module, "context")(context_BHTd.to(query.dtype))
    context_BTHd = context_BHTd.transpose(1, 2).contiguous()
    if output_gate is not None:
        gate = torch.sigmoid(output_gate).reshape(*context_BTHd.shape[:3], -1)
        context_BTHd = context_BTHd * gate
    return context_BTHd, null_BHT


def _quantizer(module: nn.Module, tensor: str) -> Callable[[Tensor], Tensor]:
    return getattr(module, f"{tensor}_quantizer", None) or nn.Identity()


AttentionInterface.register(QUANTIZED_ATTENTION, quantized_attention)
AttentionMaskInterface.register(QUANTIZED_ATTENTION, sdpa_mask)
