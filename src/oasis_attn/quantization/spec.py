"""`QuantSpec`: the format of a quantized tensor.  This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from oasis_attn.errors import UserError, check_choice

GRANULARITIES = ("tensor", "channel", "token", "group")


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """The format of a quantized tensor: number of bits, symmetry, and which entries share a scale.

    Attributes:
        bits: 2 to 8; there are 2^bits codes.
        symmetric: if true, the codes are -2^(bits-1) .. 2^(bits-1) - 1 and the scale is
            max|x| / (2^(bits-1) - 1); if false, 2^bits - 1 equal steps cover the range
            min(x, 0) .. max(x, 0).
        granularity: `tensor` (one scale), `channel` (one scale per row of a weight [out, in]),
            `token` (one scale per row of an activation [..., D]) or `group` (one scale per
            `group_size` neighboring entries of a row).  `channel` and `token` compute the same;
            the first is for weights, the second for activations.
        group_size: entries per scale; required for `group`, not allowed otherwise.

    Raises:
        UserError: a value is not allowed.
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
                f"{self.granularity!r}; granularity 'group' needs a group_size, and no other"
                " granularity takes one"
            )
        size = self.group_size
        if size is not None and (type(size) is not int or size < 1):
            raise UserError(f"group_size: {size!r} is not an integer of at least 1")
