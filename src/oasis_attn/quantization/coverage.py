"""How much of a model is quantised: which share of its weights, and which weights are not.

Weights are parameters of two or more dimensions.  By convention embeddings are left out, and so is
an output head that is not quantised.
"""

from __future__ import annotations

import math

from torch import nn
from transformers import PreTrainedModel

from oasis_attn.quantization.linear import QuantizedLinear


def quantized_share(model: PreTrainedModel) -> float:
    """Entries of quantised weights over entries of all weights."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    quantized = sum(math.prod(layer.shape) for layer in layers)
    return quantized / (quantized + sum(float_weights(model).values()))


def float_weights(model: PreTrainedModel) -> dict[str, int]:
    """Entries of each weight that stays in floating point, by the parameter's name."""
    output = model.get_output_embeddings()
    return {
        f"{name}.{own}": parameter.numel()
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding | QuantizedLinear) and module is not output
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and not own.endswith("bias")
    }


def rounded_to_nearest(model: PreTrainedModel) -> list[str]:
    """The layers of a GPTQ scheme that no calibration token reached: experts; see `gptq`."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and module.rounding != module.scheme.rounding
    ]
