"""How much of a model is quantized: the share of quantized weights, and the weights in float.

Weights are parameters of two or more dimensions.  Embeddings do not count, nor does an output head
that is not quantized.
"""

from __future__ import annotations

import math

from torch import nn
from transformers import PreTrainedModel

from oasis_attn.quantization.linear import QuantizedLinear


def quantized_share(model: PreTrainedModel) -> float:
    """The number of entries of quantized weights divided by that of all weights."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    quantized = sum(math.prod(layer.shape) for layer in layers)
    return quantized / (quantized + sum(float_weights(model).values()))


def float_weights(model: PreTrainedModel) -> dict[str, int]:
    """The number of entries of each weight in floating point, by parameter name."""
    output = model.get_output_embeddings()
    return {
        f"{name}.{own}": parameter.numel()
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding | QuantizedLinear) and module is not output
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and not own.endswith("bias")
    }


def rounded_to_nearest(model: PreTrainedModel) -> list[str]:
    """The layers (experts) of a GPTQ scheme that no calibration token reached; see `gptq`."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and module.rounding != module.scheme.rounding
    ]
