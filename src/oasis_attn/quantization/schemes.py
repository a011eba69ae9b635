"""Quantisation schemes as data: one table of which grid weights and activations are put on."""

from __future__ import annotations

from dataclasses import dataclass

from oasis_attn.errors import UserError, check_choice
from oasis_attn.quantization.grids import Grid
from oasis_attn.quantization.ranges import ESTIMATORS


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What is quantised how; vary a row of the table with `dataclasses.replace`.

    Attributes:
        name: how records and error messages call it.
        weight: the grid of linear layers' weights [out, in].
        activation: the grid of linear layers' inputs [..., in]; None leaves them as they are.
        static: True fixes one range per input on calibration data, False takes each input's own.
        estimator: a name in `ESTIMATORS`, for weights and static ranges; dynamic ones are min-max.
    """

    name: str
    weight: Grid
    activation: Grid | None
    static: bool = False
    estimator: str = "minmax"

    def __post_init__(self) -> None:
        check_choice("estimator", self.estimator, ESTIMATORS)
        if self.weight.granularity == "token":
            raise UserError("weight: granularity 'token' is for activations; name 'channel'")
        given = self.activation.granularity if self.activation else None
        if given == "channel":
            raise UserError("activation: granularity 'channel' is for weights; name 'token'")
        if self.static and given != "tensor":
            raise UserError(f"static: granularity {given!r} has no static range, only 'tensor' has")


def _symmetric(bits: int, granularity: str, group_size: int | None = None) -> Grid:
    return Grid(bits=bits, symmetric=True, granularity=granularity, group_size=group_size)


def _per_token(bits: int) -> Grid:
    return Grid(bits=bits, symmetric=False, granularity="token")


_TABLE = (
    # The outlier literature (Bondarenko et al. 2023, 2306.12929), on linear layers only.
    Scheme(
        name="w8a8-static-linear",
        weight=_symmetric(8, "tensor"),
        activation=Grid(bits=8, symmetric=False),
        static=True,
    ),
    # Round to nearest, activations per token (Yao et al. 2022, 2206.01861).
    Scheme(name="w8a8-dynamic", weight=_symmetric(8, "channel"), activation=_per_token(8)),
    Scheme(name="w4a8", weight=_symmetric(4, "channel"), activation=_per_token(8)),
    Scheme(name="w4a4", weight=_symmetric(4, "channel"), activation=_per_token(4)),
    # Groups of 32: they divide the width of small models too, where the usual 128 does not.
    Scheme(name="w4a16", weight=_symmetric(4, "group", 32), activation=None),
)


def schemes() -> dict[str, Scheme]:
    """The schemes by name."""
    return {scheme.name: scheme for scheme in _TABLE}
