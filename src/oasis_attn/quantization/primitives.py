"""Simulated uniform quantization: round each value to the nearest point of a small uniform grid.

A *block* is the set of entries that share one scale.  The functions work on tensors of blocks
[..., N], with one block along the last axis.  The integer codes are signed and have no zero point:
code k stands for k * scale, so zero is always represented exactly.  In the usual unsigned notation
the zero point is `-quant_min`.

    x^ = scale * clamp(round(x / scale), quant_min, quant_max)
                                                    (Jacob et al. 2018, 1712.05877, section 2.1)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from oasis_attn.errors import UserError
from oasis_attn.quantization.spec import QuantSpec


class QParams(NamedTuple):
    """Quantization parameters of a tensor: one entry per block, with a last axis of size 1.

    The dtype is float32, or float64 for float64 data.  `quant_min` <= 0 <= `quant_max` are the
    smallest and the largest integer code.
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
            f"group_size: {spec.group_size} does not divide the {x.shape[-1]} entries of {name}"
        )
    return x.unflatten(-1, (-1, spec.group_size))


def compute_qparams(low: Tensor, high: Tensor, spec: QuantSpec) -> QParams:
    """Compute the parameters that cover the ranges `low` .. `high`, one range per block.

    The ranges must be finite; they are extended to include zero.  Values inside the range move by
    at most scale / 2.  A block of zeros gets the smallest normal number as its scale, so that it
    stays zero.
    """
    dtype = torch.promote_types(low.dtype, torch.float32)
    low, high = low.to(dtype).clamp(max=0), high.to(dtype).clamp(min=0)
    tiny = torch.finfo(dtype).tiny
    if spec.symmetric:
        top = 2 ** (spec.bits - 1) - 1
        scale = (torch.maximum(-low, high) / top).clamp(min=tiny)
        return QParams(scale, torch.full_like(scale, -top - 1), torch.full_like(scale, top))
    steps = 2**spec.bits - 1
    scale = (high / steps - low / steps).clamp(min=tiny)
    quant_min = (low / scale).round().clamp(min=-steps)
    return QParams(scale, quant_min, quant_min + steps)


def fake_quantize(blocks: Tensor, qparams: QParams) -> Tensor:
    """Round every entry to the nearest value that has a code, keeping shape and dtype.

    The rounding is computed in at least float32.  Infinities are clipped to the end of the range;
    NaN stays NaN.  The gradient is a straight-through estimate: 1 inside the range, 0 where the
    value was clipped (Bengio et al. 2013, 1308.3432).
    """
    return _FakeQuantize.apply(blocks, *qparams)


class _FakeQuantize(torch.autograd.Function):
    # In-place operations on one buffer.  On a CPU this is several times faster than the fused
    # operators of torch and torchao, and than `clamp`, which is slow with tensor bounds.
    @staticmethod
    def forward(
        ctx: Any, blocks: Tensor, scale: Tensor, quant_min: Tensor, quant_max: Tensor
    ) -> Tensor:
        code = torch.div(blocks, scale).round_()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((code >= quant_min) & (code <= quant_max))
        torch.maximum(code, quant_min, out=code)
        torch.minimum(code, quant_max, out=code)
        return code.mul_(scale).to(blocks.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None
