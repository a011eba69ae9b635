"""Uniform quantisation, simulated: every value moves to the nearest point of a small grid.

A *block* is the entries that share one scale; functions see a tensor as blocks [..., N], one block
along the last axis.  Levels are counted from zero's own: level k stands for k * scale, so that zero
is exact by construction, and the zero point of the usual unsigned notation is `-lowest`.

    x^ = scale * clamp(round(x / scale), lowest, highest)       (Jacob et al. 2018, 1712.05877, 2.1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oasis_attn.errors import UserError, check_choice

GRANULARITIES = ("tensor", "channel", "token", "group")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How many levels, how they are placed, and which entries share a scale.

    Attributes:
        bits: 2 to 8; the grid has 2^bits levels.
        symmetric: levels -2^(bits-1) .. 2^(bits-1) - 1 of a scale max|x| / (2^(bits-1) - 1);
            otherwise the range min(x, 0) .. max(x, 0) is cut into 2^bits - 1 equal steps.
        granularity: `tensor` (one scale), `channel` (one per row of a weight [out, in]), `token`
            (one per row of an activation [..., D]), `group` (one per `group_size` neighbours of a
            row).  A channel and a token are both the last axis: the two names say what is meant.
        group_size: entries per scale; for `group` only.
    """

    bits: int
    symmetric: bool
    granularity: str = "tensor"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in range(2, 9):
            raise UserError(f"bits: {self.bits!r} is not an integer from 2 to 8")
        if not isinstance(self.symmetric, bool):
            raise UserError(f"symmetric: {self.symmetric!r} is neither true nor false")
        check_choice("granularity", self.granularity, GRANULARITIES)
        if (self.granularity == "group") != (self.group_size is not None):
            raise UserError(
                f"group_size: {self.group_size!r} does not go with granularity "
                f"{self.granularity!r}; it is given for 'group' and only there"
            )
        size = self.group_size
        if size is not None and (type(size) is not int or size < 1):
            raise UserError(f"group_size: {size!r} is not an integer of at least 1")


class Levels(NamedTuple):
    """A grid put in place: one entry per block, last axis 1; float32, or float64 for float64 data.

    `lowest` and `highest` are whole numbers, `lowest` <= 0 <= `highest`.
    """

    scale: Tensor
    lowest: Tensor
    highest: Tensor


def to_blocks(x: Tensor, grid: Grid, site: str = "x") -> Tensor:
    """View `x` as [..., N], the entries that share a scale along the last axis."""
    if grid.granularity == "tensor":
        return x.reshape(-1)
    if grid.group_size is None:
        return x
    if x.shape[-1] % grid.group_size:
        raise UserError(
            f"group_size: {grid.group_size} does not divide the {x.shape[-1]} entries of {site}"
        )
    return x.unflatten(-1, (-1, grid.group_size))


def place(low: Tensor, high: Tensor, grid: Grid) -> Levels:
    """Put `grid` over the ranges `low` .. `high` (finite, widened to hold zero).

    Inside its range no value moves by more than scale / 2.  An all-zero block gets the smallest
    normal scale, and stays zero.
    """
    dtype = torch.promote_types(low.dtype, torch.float32)
    low, high = low.to(dtype).clamp(max=0), high.to(dtype).clamp(min=0)
    tiny = torch.finfo(dtype).tiny
    if grid.symmetric:
        top = 2 ** (grid.bits - 1) - 1
        scale = (torch.maximum(-low, high) / top).clamp(min=tiny)
        return Levels(scale, torch.full_like(scale, -top - 1), torch.full_like(scale, top))
    steps = 2**grid.bits - 1
    scale = (high / steps - low / steps).clamp(min=tiny)
    lowest = (low / scale).round().clamp(min=-steps)
    return Levels(scale, lowest, lowest + steps)


def snap(blocks: Tensor, levels: Levels) -> Tensor:
    """Move every entry to the nearest level: same shape and dtype, rounding in at least float32.

    Infinities go to the outermost level, NaN stays NaN.  The gradient is passed straight through
    where the level exists and is zero where the value was clipped (Bengio et al. 2013, 1308.3432).
    """
    return _Snap.apply(blocks, *levels)


class _Snap(torch.autograd.Function):
    # Passes over one buffer: on a CPU several times faster than the fused fake-quantisation
    # operators of torch and torchao, and than clamp, which is slow with tensor bounds.
    @staticmethod
    def forward(ctx: Any, blocks: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
        level = torch.div(blocks, scale).round_()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((level >= lowest) & (level <= highest))
        torch.maximum(level, lowest, out=level)
        torch.minimum(level, highest, out=level)
        return level.mul_(scale).to(blocks.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None
