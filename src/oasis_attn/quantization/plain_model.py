"""The plain model of transformers that a quantized model is written as, for other programs.

Formats that are loaded without this package cannot hold every quantized model; what they cannot
hold is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from oasis_attn.errors import Refusal, UserError
from oasis_attn.hub.prefix import prefix_of
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.quantization.hf_quantizer import check_unchanged, get_quantization_config
from oasis_attn.quantization.linear import QuantizedLinear
from oasis_attn.quantization.linearize import linear_names
from oasis_attn.quantization.options import COMPRESSED_TENSORS, check_format
from oasis_attn.quantization.schemes import Scheme
from oasis_attn.quantization.simulate import quantized_modules


def checked_layers(
    model: PreTrainedModel, format: str
) -> tuple[dict[str, QuantizedLinear], Scheme]:
    """The quantized layers of `model` and its scheme; `UserError` if `format` cannot hold it."""
    layers = {name: cast(QuantizedLinear, each) for name, each in quantized_modules(model).items()}
    if not layers:
        raise UserError("model: nothing in it is quantized; call quantize first")
    fields = get_quantization_config(model)
    scheme = Scheme.from_dict(fields.scheme)
    check_format(format, scheme)
    check_transforms(model, format)
    check_model(model, layers, format)
    check_unchanged(model, layers, fields.targets)
    return layers, scheme


def check_model(model: PreTrainedModel, targets: Iterable[str], format: str) -> None:
    """Raise `Refusal` if `format` cannot hold `model` with `targets` quantized.

    The format torchao can hold experts that are not quantized; compressed-tensors cannot.
    """
    if isinstance(model.config, OasisConfig):
        raise refusal(
            format,
            "it is loaded without oasis_attn, which an OASIS model needs; convert a null without"
            " depth routing with `oasis convert --to-sinks` first",
            ", or use --format oasis and import oasis_attn where the model is loaded",
        )
    if prefix_of(model) is not None:
        raise refusal(
            format,
            "the model has a prefix, which must become part of the tokenizer; `oasis quantize"
            f" --format {format}` writes both",
        )
    plain = without_weights(model)
    modules = dict(plain.named_modules())
    for name in linear_names(plain) if format == COMPRESSED_TENSORS else targets:
        if name not in modules:  # the name that `linearize` would give it
            left_out = (
                ", whether they are quantized or not"
                if format == COMPRESSED_TENSORS
                else "; leave experts out with --ignore (ignore=...)"
            )
            raise refusal(
                format,
                f"{name} is an expert, and transformers cannot load experts in this format"
                f"{left_out}",
            )
    for name in targets:
        if not isinstance(modules[name], nn.Linear):
            raise refusal(
                format,
                f"{name} is of class {type(modules[name]).__name__}, and the format quantizes only"
                " linear layers; leave such layers out with --ignore (ignore=...)",
            )


def check_transforms(model: PreTrainedModel, format: str) -> None:
    """Raise `Refusal` if a quantized model scales inputs at run time."""
    for name in get_quantization_config(model).transforms:
        raise refusal(
            format,
            f"the input of {name} is scaled at run time, because SmoothQuant could not fold the"
            " scales into the layer before it, and such scales are not written",
        )


def refusal(format: str, reason: str, remedy: str = "") -> Refusal:
    """The error of a model that `format` cannot hold; a `remedy` is not part of its `reason`."""
    return Refusal(f"format: {format!r} cannot hold this model: {reason}{remedy}", reason=reason)


def plain_model(model: PreTrainedModel, layers: dict[str, QuantizedLinear]) -> PreTrainedModel:
    """The unquantized model, for saving, without the weights of `layers`; it shares all tensors."""
    plain, state = without_weights(model), model.state_dict()
    names = plain.state_dict().keys() - {f"{name}.weight" for name in layers}
    plain.load_state_dict({name: state[name] for name in names}, strict=False, assign=True)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same family and configuration, unquantized, on the meta device."""
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config(decoder=True)):
        vars(part).pop("quantization_config", None)
    with torch.device("meta"):
        return type(model)(config)


def float_modules(plain: PreTrainedModel, layers: dict[str, QuantizedLinear]) -> list[str]:
    """The modules with weights that are not quantized: the head, routers, gates and ignored ones.

    Embeddings are not listed, because only linear layers are quantized.
    """
    return [
        name
        for name, module in plain.named_modules()
        if name not in layers
        and not isinstance(module, nn.Embedding)
        and any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))
    ]
