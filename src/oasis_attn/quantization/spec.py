"""`QuantSpec`: the format of a quantized tensor.  This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from oasis_attn.errors import UserError, check_choice

GRANULARITIES = ("tensor", "channel", "token", "group")


class FloatType(NamedTuple):
    """A floating-point type with a sign, subnormal numbers and no infinities."""

    bits: int
    mantissa_bits: int
    min_exponent: int
    """The exponent of the smallest normal number."""
    max_exponent: int
    largest: float


FLOAT_TYPES = {
    # OCP Microscaling Formats (MX) 1.0, section 5.3.3: 0, 0.5, 1, 1.5, 2, 3, 4, 6
    "e2m1": FloatType(bits=4, mantissa_bits=1, min_exponent=0, max_exponent=2, largest=6.0),
    # OCP 8-bit Floating Point 1.0
    "e4m3": FloatType(bits=8, mantissa_bits=3, min_exponent=-6, max_exponent=8, largest=448.0),
}
ELEMENT_TYPES = ("int", *FLOAT_TYPES)
SCALE_TYPES = ("float32", "e8m0", "e4m3")


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """The format of a quantized tensor: the type of its elements, and which of them share a scale.

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
        element_type: `int`, or a floating-point type: `e2m1` (4 bits) or `e4m3` (8 bits).  These
            are symmetric, and their scale is max|x| / 6 or max|x| / 448.
        scale_type: the type of scales: `float32`; or, for groups of floating-point elements,
            `e8m0`, the powers of two of the MX formats; or `e4m3`, relative to a float32 scale of
            the whole tensor, as in NVFP4.

    Raises:
        UserError: a value is not allowed.
    """

    bits: int
    symmetric: bool
    granularity: str = "tensor"
    group_size: int | None = None
    element_type: str = "int"
    scale_type: str = "float32"

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
        self._check_types()

    def _check_types(self) -> None:
        check_choice("element_type", self.element_type, ELEMENT_TYPES)
        check_choice("scale_type", self.scale_type, SCALE_TYPES)
        kind = FLOAT_TYPES.get(self.element_type)
        if kind is not None and self.bits != kind.bits:
            raise UserError(
                f"bits: {self.bits} does not go with element_type {self.element_type!r}, which has"
                f" {kind.bits} bits"
            )
        if kind is not None and not self.symmetric:
            raise UserError(
                f"symmetric: False does not go with element_type {self.element_type!r}, which has"
                " no zero point"
            )
        if self.scale_type != "float32" and (kind is None or self.granularity != "group"):
            raise UserError(
                f"scale_type: {self.scale_type!r} is for granularity 'group' and element_type"
                f" {' or '.join(map(repr, FLOAT_TYPES))}; use 'float32'"
            )

    @property
    def has_static_scale(self) -> bool:
        """Whether there is one scale for the whole tensor, which can be fixed in advance.

        In a format with `e4m3` scales, these are relative to it, and are computed from each input.
        """
        return self.granularity == "tensor" or self.scale_type == "e4m3"

    @property
    def steps(self) -> float:
        """The number of steps that cover a range; of floating-point elements, the smallest steps.

        These are the steps around zero, where the other values are if some are much larger.
        """
        kind = FLOAT_TYPES.get(self.element_type)
        if kind is None:
            return 2**self.bits - 1
        return 2 * kind.largest * 2.0 ** (kind.mantissa_bits - kind.min_exponent)

    def per_tensor(self) -> QuantSpec:
        """The same elements with a single float32 scale."""
        return replace(self, granularity="tensor", group_size=None, scale_type="float32")
