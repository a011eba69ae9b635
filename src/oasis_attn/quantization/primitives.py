"""Simulated quantization: round each value to the nearest point of a small grid.

A *block* is the set of entries that share one scale.  The functions work on tensors of blocks
[..., N], with one block along the last axis.  The integer codes are signed and have no zero point:
code k stands for k * scale, so zero is always represented exactly.  In the usual unsigned notation
the zero point is `-quant_min`.

    x^ = scale * clamp(round(x / scale), quant_min, quant_max)
                                                    (Jacob et al. 2018, 1712.05877, section 2.1)

The codes of floating-point elements are the numbers of the type: `round` rounds to the nearest of
them, half way to the even mantissa.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from oasis_attn.errors import UserError
from oasis_attn.quantization.spec import FLOAT_TYPES, QuantSpec


class QParams(NamedTuple):
    """Quantization parameters of a tensor: one entry per block, with a last axis of size 1.

    The dtype is float32, or float64 for float64 data.  `quant_min` <= 0 <= `quant_max` are the
    smallest and the largest code.
    """

    scale: Tensor
    quant_min: Tensor
    quant_max: Tensor


def to_blocks(x: Tensor, spec: QuantSpec, name: str = "x") -> Tensor:
    """View `x` as blocks [..., N]: the entries along the last axis share a scale.

    Raises:
        UserError: the group size does not divide the last axis of `x`; the message calls it `name`.
    """
    if spec.granularity == "tensor":
        return x.reshape(-1)
    if spec.group_size is None:
        return x
    if x.shape[-1] % spec.group_size:
        raise UserError(
            f"group_size: {spec.group_size} does not divide the {x.shape[-1]} entries of {name};"
            " choose a divisor (weight.group_size, activation.group_size) or leave the layer out"
            " (ignore)"
        )
    return x.unflatten(-1, (-1, spec.group_size))


def compute_qparams(
    low: Tensor, high: Tensor, spec: QuantSpec, *, tensor_scale: Tensor | None = None
) -> QParams:
    """Compute the parameters that cover the ranges `low` .. `high`, one range per block.

    The ranges must be finite; they are extended to include zero.  Integers inside the range move by
    at most scale / 2.  A block of zeros stays zero: its scale is the smallest of its type.

    Args:
        low, high: the ranges, with a last axis of size 1.
        spec: the format.
        tensor_scale: for `e4m3` scales, the scale of the whole tensor, by default that of the
            largest range.
    """
    dtype = torch.promote_types(low.dtype, torch.float32)
    low, high = low.to(dtype).clamp(max=0), high.to(dtype).clamp(min=0)
    tiny = torch.finfo(dtype).tiny
    if spec.element_type != "int":
        scale = _float_scale(torch.maximum(-low, high), spec, tensor_scale)
        top = FLOAT_TYPES[spec.element_type].largest
        return QParams(scale, torch.full_like(scale, -top), torch.full_like(scale, top))
    if spec.symmetric:
        top = 2 ** (spec.bits - 1) - 1
        scale = (torch.maximum(-low, high) / top).clamp(min=tiny)
        return QParams(scale, torch.full_like(scale, -top - 1), torch.full_like(scale, top))
    steps = 2**spec.bits - 1
    scale = (high / steps - low / steps).clamp(min=tiny)
    quant_min = (low / scale).round().clamp(min=-steps)
    return QParams(scale, quant_min, quant_min + steps)


def _float_scale(largest: Tensor, spec: QuantSpec, tensor_scale: Tensor | None) -> Tensor:
    """The scales of blocks of floating-point elements with these largest magnitudes."""
    kind = FLOAT_TYPES[spec.element_type]
    if spec.scale_type == "e8m0":  # OCP Microscaling Formats (MX) 1.0, section 6.3
        return (power_of_two(largest) * 2.0**-kind.max_exponent).clamp(2.0**-127, 2.0**127)
    tiny = torch.finfo(largest.dtype).tiny
    scale = (largest / kind.largest).clamp(min=tiny)
    if spec.scale_type == "float32":
        return scale
    encode = encode_scale(scale.max() if tensor_scale is None else tensor_scale)
    e4m3 = FLOAT_TYPES["e4m3"]
    smallest = 2.0 ** (e4m3.min_exponent - e4m3.mantissa_bits)
    return round_codes(scale * encode, "e4m3").clamp_(smallest, e4m3.largest) / encode


def encode_scale(tensor_scale: Tensor) -> Tensor:
    """The factor that turns scales into `e4m3` numbers: 448 for the scale of the whole tensor.

    It is the reciprocal of the second scale of NVFP4; the format stores it (2509.25149).
    """
    top = FLOAT_TYPES["e4m3"].largest
    return top / tensor_scale.clamp(min=torch.finfo(tensor_scale.dtype).tiny * top)


def two_level_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """The `e4m3` numbers and the `encode_scale`, [1], whose quotients are the scales of blocks."""
    integer, _ = _EXPONENT_BITS[scale.dtype]
    near = encode_scale(scale.max().view(1)).view(integer)  # two roundings from the one wanted
    for steps in (0, 1, -1, 2, -2):
        encode = (near + steps).view(scale.dtype)
        numbers = round_codes(scale * encode, "e4m3")
        if torch.equal(numbers / encode, scale):
            return numbers, encode
    raise AssertionError("not the scales of blocks")


def power_of_two(x: Tensor) -> Tensor:
    """The largest power of two that is at most |x|, float32 or float64; 0 for subnormal numbers.

    That is the number without its mantissa.  NaN gives infinity.
    """
    integer, exponent = _EXPONENT_BITS[x.dtype]
    return x.view(integer).bitwise_and(exponent).view(x.dtype)


_EXPONENT_BITS = {
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
}


def round_codes(code: Tensor, element_type: str) -> Tensor:
    """Round codes, float32 or float64, in place to the nearest ones of a type in `ELEMENT_TYPES`.

    Codes half way between two others become the one that is even, or has an even mantissa.  There
    is no largest code: the distance of those beyond the type's range is that at the end of it.
    """
    if element_type == "int":
        return code.round_()
    kind = FLOAT_TYPES[element_type]
    step = power_of_two(code).clamp_(2.0**kind.min_exponent, 2.0**kind.max_exponent)
    step.mul_(2.0**-kind.mantissa_bits)
    return code.div_(step).round_().mul_(step)


def fake_quantize(blocks: Tensor, qparams: QParams, element_type: str = "int") -> Tensor:
    """Round every entry to the nearest value that has a code, keeping shape and dtype.

    `element_type` is that of the codes.  The rounding is computed in at least float32.  Infinities
    are clipped to the end of the range; NaN stays NaN.  The gradient is a straight-through
    estimate: 1 inside the range, 0 where the value was clipped (Bengio et al. 2013, 1308.3432).
    """
    return _FakeQuantize.apply(blocks, *qparams, element_type)


class _FakeQuantize(torch.autograd.Function):
    # In-place operations on one buffer.  On a CPU this is several times faster than the fused
    # operators of torch and torchao, and than `clamp`, which is slow with tensor bounds.
    @staticmethod
    def forward(
        ctx: Any,
        blocks: Tensor,
        scale: Tensor,
        quant_min: Tensor,
        quant_max: Tensor,
        element_type: str,
    ) -> Tensor:
        code = round_codes(torch.div(blocks, scale), element_type)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((code >= quant_min) & (code <= quant_max))
        torch.maximum(code, quant_min, out=code)
        torch.minimum(code, quant_max, out=code)
        return code.mul_(scale).to(blocks.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None, None
