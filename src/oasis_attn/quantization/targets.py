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
    SublayerMap,
    decoder_map,
    find_decoder,
    is_cross_attention,
    is_part_of,
    is_router,
)
from oasis_attn.modeling.families import why_without_row
from oasis_attn.modeling.hf_compat import (
    attention_implementation,
    sdpa_mask,
    set_attention_implementation,
)
from oasis_attn.ops.null_attention import naive_mix
from oasis_attn.quantization.linearize import linear_names
from oasis_attn.quantization.quantizers import StaticQuantizer
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
    """The tensors between the linear layers of a decoder, in the order in which they are computed.

    These are the probabilities and the context of attention, the outputs of all norms, and the
    residual stream wherever a module reads it: the `input` of each layer (of the first one, the
    embedding), the sum after its attention, and the input of the final norm.  The next sum is
    computed from the quantized stream.

    With depth routing, the stream is the mix that a sublayer reads (in the authors' form, the
    state), and the outputs of attention and MLP, which are the sources of the mix, are quantized
    too; in the block form, these are the members of a block.  Scores and weights over depth, null
    logits and null probabilities stay in floating point: they are a few numbers per token, and no
    integer kernel computes them.

    Raises:
        UserError: the family has no row in `modeling.families`, so that it is not certain where its
            norms are and what is added to its residual stream.
    """
    text = model.config.get_text_config(decoder=True)
    decoder = decoder_map(model)
    if not decoder.has_row:
        raise UserError(
            f"targets: 'full' is not possible with family {text.model_type!r}:"
            f" {why_without_row(text)}; use 'linear'"
        )
    routed = getattr(model.config, "residual", "sum") != "sum"
    found: list[str] = []

    def branch_output(sublayer: SublayerMap) -> list[str]:
        if sublayer.post_norm or routed:
            return [f"{(sublayer.post_norm or sublayer).name}:output"]
        return []

    for layer in decoder.layers:
        attention, mlp = layer.attention, layer.mlp
        assert attention is not None
        assert mlp is not None
        found.append(f"{layer.name}:input")
        if attention.pre_norm:
            found.append(f"{attention.pre_norm.name}:output")
        found += [f"{attention.name}:probabilities", f"{attention.name}:context"]
        found += branch_output(attention)
        found.append(f"{(mlp.pre_norm or mlp).name}:input")
        if mlp.pre_norm:
            found.append(f"{mlp.pre_norm.name}:output")
        found += branch_output(mlp)
    assert decoder.final_norm is not None
    return *found, f"{decoder.final_norm.name}:input", f"{decoder.final_norm.name}:output"


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
        in_layer = hasattr(model.get_submodule(name.rpartition(".")[0]), "self_attn")
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
