"""Export of a quantized model in the format torchao, which transformers computes in int8.

transformers and torchao load the folder without this package.  Its linear layers then multiply
int8 codes by int8 codes, as `int8` does; a folder in the format compressed-tensors computes in
floating point there.  Codes and scales are those of the quantized model: nothing is quantized
again.

torchao writes and reads its tensors in safetensors files, with their types in the metadata.
transformers does not read the scale and zero point of static ranges (`act_quant_scale`,
`act_quant_zero_point`) from them, so that only ranges per token can be written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TorchAoConfig

from oasis_attn.errors import UserError
from oasis_attn.files import staged_folder
from oasis_attn.hub.model_card import write_card
from oasis_attn.quantization.hf_quantizer import codes_of
from oasis_attn.quantization.int8 import int8_weight
from oasis_attn.quantization.linear import QuantizedLinear
from oasis_attn.quantization.options import TORCHAO
from oasis_attn.quantization.plain_model import checked_layers, float_modules, plain_model


@torch.no_grad()
def save_torchao(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a quantized model in the format torchao, with a model card.

    `AutoModelForCausalLM.from_pretrained(folder)` loads it without `oasis_attn`, if torchao is
    installed.  In the dtype of `model`, which is the default, its logits are equal bit for bit to
    those of `int8.to_int8(model)`.  In another dtype, the floating-point part of the model is
    rounded; codes and scales stay as they are.

    Args:
        model: a quantized model of a family of transformers, simulated or in integer arithmetic.
        folder: a new folder.  The tokenizer is not part of it.

    Raises:
        UserError: torchao is not installed; the format cannot hold the scheme or the model; weights
            were changed after quantizing; the model is in float64; the folder exists.  Nothing is
            written then.
    """
    layers = _checked(model)
    with staged_folder(folder) as stage:
        _write(model, layers, stage)


def write_torchao(model: PreTrainedModel, folder: Path) -> None:
    """As `save_torchao`, into a folder that exists."""
    _write(model, _checked(model), folder)


def _checked(model: PreTrainedModel) -> dict[str, QuantizedLinear]:
    layers, _ = checked_layers(model, TORCHAO)
    if model.dtype == torch.float64:
        raise UserError("model: int8 kernels do not support float64; cast the model to float32")
    return layers


def _write(model: PreTrainedModel, layers: dict[str, QuantizedLinear], stage: Path) -> None:
    from oasis_attn.modeling.hf_compat import (
        AutoHfQuantizer,
        Int8DynamicActivationInt8WeightConfig,
        MappingType,
        PerRow,
        PerTensor,
    )

    plain: Any = plain_model(model, layers)
    for name, layer in layers.items():
        weight = int8_weight(layer, codes_of(layer, name), model.dtype)
        plain.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    first = next(iter(layers.values()))
    per_channel = first.scheme.weight.granularity == "channel"
    # The tensors have all that loading needs; this describes them for people and other programs.
    config = TorchAoConfig(
        Int8DynamicActivationInt8WeightConfig(
            granularity=[PerRow(), PerRow() if per_channel else PerTensor()],
            act_mapping_type=MappingType.ASYMMETRIC,
        ),
        modules_to_not_convert=float_modules(plain, layers),
    )
    plain.config.quantization_config = config
    plain.hf_quantizer = AutoHfQuantizer.from_config(config)
    plain.save_pretrained(stage)
    write_card(model, stage, format=TORCHAO)
