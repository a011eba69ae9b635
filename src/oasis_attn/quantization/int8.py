"""Integer arithmetic for a quantized model, by torchao's int8 kernels.

    y = s_x s_w (q_x - z_x) q_w    (Jacob et al. 2018, 1712.05877, eq. 4), q int8, sums int32

Weights, scales and static ranges are those of the simulated model; torchao does not compute its
own.  Both models therefore compute the same up to floating-point rounding, which decides the code
of an input that lies half way between two codes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.quantization.casts import apply_keeping_dtype
from oasis_attn.quantization.hf_quantizer import (
    CODES,
    get_quantization_config,
    set_quantization_config,
)
from oasis_attn.quantization.linear import QuantizedLinear
from oasis_attn.quantization.options import check_has_kernels, simulate_hint
from oasis_attn.quantization.quantizers import StaticQuantizer
from oasis_attn.quantization.schemes import Scheme


def check_kernels(scheme: Scheme, device: torch.device, fallback: str = "") -> None:
    """Raise `UserError` unless int8 kernels on `device` can compute what `scheme` simulates.

    `fallback` is that of `options.Choice`.
    """
    check_has_kernels(scheme, fallback)
    try:
        from oasis_attn.modeling.hf_compat import should_reduce_range
    except ImportError as error:
        raise UserError(
            f"scheme: int8 kernels need torchao: pip install 'oasis-attn[int8]' ({error}); or"
            f" {simulate_hint(fallback)}"
        ) from error
    if should_reduce_range(device):
        raise UserError(
            f"scheme: {scheme.name!r} can only be simulated: 8-bit sums overflow on this processor,"
            f" which has no VNNI instructions; {simulate_hint(fallback)}"
        )


class Int8Linear(QuantizedLinear):
    """A `QuantizedLinear` that stores its weight as int8 codes, in the buffer `weight_codes`.

    Its parameter `weight` is empty; some families (DeepSeek V3.2) read the dtype of a weight.
    """

    weight_codes: Tensor

    def codes(self) -> Tensor:
        return self.weight_codes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return apply_keeping_dtype(self, self.fixed_buffers, fn, recurse)

    def forward(self, input: Tensor) -> Tensor:
        if self.input_transform is not None:
            input = self.input_transform(input)
        if input.dtype == torch.float64:
            raise UserError("model: int8 kernels do not support float64; cast the model to float32")
        static: dict[str, Tensor] = {}
        if isinstance(self.input_quantizer, StaticQuantizer):
            quantizer, shape = self.input_quantizer, [1] * input.ndim
            static = {
                "act_quant_scale": quantizer.scale.view(shape),
                "act_quant_zero_point": (-128 - quantizer.quant_min).view(shape).to(torch.int8),
            }
        weight = int8_weight(self, self.weight_codes, input.dtype, **static)
        return F.linear(input, weight, self.bias)


def int8_weight(
    layer: QuantizedLinear, codes: Tensor, dtype: torch.dtype, **static: Tensor
) -> Tensor:
    """The weight of `layer` as torchao's int8 tensor, which computes the layer on multiplication.

    Args:
        layer: has the scales.
        codes: `layer.codes()`.
        dtype: that of inputs and outputs.
        static: scale and zero point of the input, as torchao names them; without them, torchao
            computes both for each token.
    """
    scale = layer.weight_scale.view(-1, 1)
    rows = 1 if len(scale) > 1 else layer.out_features
    tensor, per_tensor, per_token = _torchao()
    weight: Tensor = tensor(
        codes,
        scale,
        [rows, layer.in_features],
        dtype,
        act_quant_kwargs=per_tensor if static else per_token,
        **static,
    )
    return weight


@cache
def _torchao() -> tuple[Any, Any, Any]:
    """torchao's int8 tensor class, and its input quantization per tensor and per token."""
    from oasis_attn.modeling.hf_compat import (
        Int8Tensor,
        MappingType,
        PerRow,
        PerTensor,
        QuantizeTensorToInt8Kwargs,
    )

    per_tensor, per_token = (
        QuantizeTensorToInt8Kwargs(granularity=kind, mapping_type=MappingType.ASYMMETRIC)
        for kind in (PerTensor(), PerRow())
    )
    return Int8Tensor, per_tensor, per_token


def to_int8(model: PreTrainedModel) -> PreTrainedModel:
    """Switch the linear layers of a simulated model to int8 kernels, in place; returns `model`.

    Raises:
        UserError: nothing in `model` is quantized, or there are no kernels for its scheme.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if not layers:
        raise UserError("model: nothing in it is quantized; call quantize first")
    check_kernels(layers[0].scheme, model.device)
    for layer in layers:
        layer.register_buffer(CODES, layer.codes())
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
        layer.__class__ = Int8Linear
    set_quantization_config(model, vars(get_quantization_config(model)) | {"arithmetic": "int8"})
    return model
