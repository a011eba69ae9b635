"""Which tensors of a model are quantised, by exact name, and the hooks that do it.

A linear layer is named as it is in the model, or, of an expert, as it is after `linearize`: its
weight and its input are quantised.  Any other tensor is `module:tensor`, with tensor one of
`input`, `output`, and, of an attention module, `probabilities` and `context` (its mix of values,
before any gate).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from oasis_attn.modeling.attention import oasis_attention, observed
from oasis_attn.modeling.configuration import ATTENTION, OasisConfig
from oasis_attn.modeling.families import family_of
from oasis_attn.modeling.hf_compat import (
    attention_implementation,
    sdpa_mask,
    set_attention_implementation,
)
from oasis_attn.ops.null_attention import naive_mix
from oasis_attn.quantization.branches import decoder_layers, decoder_of
from oasis_attn.quantization.linearize import linear_names
from oasis_attn.quantization.quantizers import StaticQuantizer
from oasis_attn.quantization.schemes import Scheme

QUANTIZED_ATTENTION = "oasis-quantized"
# Routers and gates: small, and what they compute decides more than it adds.
_KEPT = re.compile(r"\.(output_gate|shared_expert_gate|gate(\.wg)?|router(\.\w+)?)$|\.attn_res_")


def linear_sites(model: PreTrainedModel, *, head: bool = False) -> tuple[str, ...]:
    """Names of the layers that a scheme quantises unless told otherwise, in the model's order.

    Every linear layer, those of experts and `Conv1D` included, except gates on attention outputs
    and on shared experts, routers of experts and of depth, Mamba's `dt_proj`, and the output head;
    with `head`, that too.  Embeddings, norms and null logits are never among them, nor are weights
    of module classes that `linearize` does not know: see `coverage`.
    """
    output = None if head else model.get_output_embeddings()
    heads = {name for name, module in model.named_modules() if module is output}
    return tuple(n for n in linear_names(model) if n not in heads and not _KEPT.search(n))


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Those of `linear_sites` that are `nn.Linear` modules: all of them, after `linearize`."""
    sites = set(linear_sites(model))
    return {
        name: module
        for name, module in model.named_modules()
        if name in sites and isinstance(module, nn.Linear)
    }


def tensor_sites(model: PreTrainedModel) -> tuple[str, ...]:
    """What stands between a decoder's linear layers, in the order it is computed.

    Attention probabilities and context, the outputs of the layers' norms and of the final one, and
    the residual stream wherever it is read: each layer's `input` (the embedding, for the first),
    the sum after its attention, the final norm's input.  What is read is what is carried on.

    With depth routing, what is read is each mix h_l (the authors' form: each state), and the
    sources are quantised where they arise, as the outputs of attention and MLP; of a block of
    several sublayers, its members are.  The routers themselves stay in floating point: scores,
    weights over depth, null logits and the null signal are a few numbers per token, and no integer
    kernel computes them.

    Raises:
        UserError: a family without a row in `modeling.families`, which tells where its norms are.
    """
    config = model.config.get_text_config(decoder=True)
    family = family_of(config)
    routed = getattr(model.config, "residual", "sum") != "sum"
    names = {id(module): name for name, module in model.named_modules()}
    found: list[str] = []
    for layer in decoder_layers(model)[1]:
        here = names[id(layer)]

        def norm(name: str | None, here: str = here) -> list[str]:
            return [f"{here}.{name}:output"] if name else []

        def branch(name: str, after: str | None, here: str = here) -> list[str]:
            return norm(after) if after or not routed else [f"{here}.{name}:output"]

        found += [f"{here}:input", *norm(family.pre_attention)]
        found += [f"{here}.self_attn:probabilities", f"{here}.self_attn:context"]
        found += branch("self_attn", family.post_attention)
        found += [f"{here}.{family.pre_mlp or family.mlp}:input", *norm(family.pre_mlp)]
        found += branch(family.mlp, family.post_mlp)
    last = [child for child in decoder_of(model).children() if "Norm" in type(child).__name__][-1]
    return *found, f"{names[id(last)]}:input", f"{names[id(last)]}:output"


def add_quantizer(model: PreTrainedModel, site: str, scheme: Scheme) -> StaticQuantizer:
    """Quantise one of the `tensor_sites` of `model`, by `<module>.<tensor>_quantizer`."""
    name, _, tensor = site.partition(":")
    module: Any = model.get_submodule(name)
    assert scheme.activation is not None
    quantizer = StaticQuantizer(scheme.activation, observer=scheme.observer, name=site)
    module.add_module(f"{tensor}_quantizer", quantizer)
    if tensor == "output":
        module.register_forward_hook(_quantize_output)
    elif tensor == "input":
        routed = isinstance(model.config, OasisConfig) and model.config.residual == "depth"
        layer = hasattr(module, "self_attn")
        # A sum's hidden state is read by the norm and carried on past it: both must see the levels.
        hook = _quantize_input if layer or routed or _is_last(model, module) else _overwrite_input
        module.register_forward_pre_hook(hook)
    elif attention_implementation(module.config) != QUANTIZED_ATTENTION:
        if attention_implementation(model.config) != ATTENTION:
            model.set_attn_implementation(ATTENTION)
        # A config of its own, so that whoever switches the model's function leaves this one.
        module.config = copy.copy(module.config)
        set_attention_implementation(module.config, QUANTIZED_ATTENTION)
    return quantizer


def _is_last(model: PreTrainedModel, module: nn.Module) -> bool:
    return any(child is module for child in decoder_of(model).children())


# Module-level functions that find their quantiser on the module: a copied model runs its own.


def _first(value: Any, quantizer: Callable[[Tensor], Tensor]) -> Any:
    """`value` with its first tensor quantised: the state of a depth stream, a branch's output."""
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
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`oasis_attention`, with its map and its mix of values quantised; it stores the map."""
    calls: list[Any] = []

    def see(_module: nn.Module, call: Any) -> None:
        calls.append(call)

    with observed(see):
        kwargs["output_attentions"] = True
        _, null_BHT = oasis_attention(module, query, key, value, attention_mask, **kwargs)
    (call,) = calls
    context_BHTd = naive_mix(
        _site(module, "probabilities")(call.weights_BHTS),
        call.value_BGSd,
        kwargs.get("dropout", 0.0),
    )
    context_BHTd = _site(module, "context")(context_BHTd.to(query.dtype))
    context_BTHd = context_BHTd.transpose(1, 2).contiguous()
    if output_gate is not None:
        gate = torch.sigmoid(output_gate).reshape(*context_BTHd.shape[:3], -1)
        context_BTHd = context_BTHd * gate
    return context_BTHd, null_BHT


def _site(module: nn.Module, tensor: str) -> Callable[[Tensor], Tensor]:
    return getattr(module, f"{tensor}_quantizer", None) or nn.Identity()


AttentionInterface.register(QUANTIZED_ATTENTION, quantized_attention)
AttentionMaskInterface.register(QUANTIZED_ATTENTION, sdpa_mask)
