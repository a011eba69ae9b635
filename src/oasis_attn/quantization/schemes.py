"""Quantisation schemes as data: one table of what is put on which grid, and by which means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from oasis_attn.errors import UserError, check_choice
from oasis_attn.quantization.grids import Grid
from oasis_attn.quantization.ranges import ESTIMATORS

SITES = ("linear", "full")
ROTATIONS = ("none", "hadamard", "inputs")
ROUNDINGS = ("nearest", "gptq")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What is quantised how; vary a row of the table with `dataclasses.replace`.

    Attributes:
        name: how records and error messages call it.
        weight: the grid of linear layers' weights [out, in].
        activation: the grid of activations [..., in]; None leaves them as they are.
        static: True fixes one range per tensor on calibration data, False takes each input's own.
        estimator: a name in `ESTIMATORS`, for weights and static ranges; dynamic ones are min-max.
        sites: `linear` quantises the weights and inputs of linear layers; `full` also what stands
            between them, see `sites.tensor_sites`.
        head: the output head too.
        smooth_alpha: moves outliers from activations to weights first (SmoothQuant, 2211.10438),
            0 none of them, 1 all; None leaves it out.
        rotation: `hadamard` rotates the residual stream and the MLP's inner width first (QuaRot,
            2404.00456), so that no channel stands out; `inputs` rotates the input of every linear
            layer as the model runs: slower, for any family, and closer to the function at 4 bits.
        rounding: of weights, to the `nearest` level, or by `gptq` (2210.17323) to what moves the
            layer's output least.
    """

    name: str
    weight: Grid
    activation: Grid | None
    static: bool = False
    estimator: str = "minmax"
    sites: str = "linear"
    head: bool = False
    smooth_alpha: float | None = None
    rotation: str = "none"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("sites", self.sites, SITES)
        check_choice("rotation", self.rotation, ROTATIONS)
        check_choice("rounding", self.rounding, ROUNDINGS)
        for name in ("static", "head"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}: {getattr(self, name)!r} is neither true nor false")
        if self.weight.granularity == "token":
            raise UserError("weight: granularity 'token' is for activations; name 'channel'")
        given = self.activation.granularity if self.activation else None
        if given == "channel":
            raise UserError("activation: granularity 'channel' is for weights; name 'token'")
        if self.static and given != "tensor":
            raise UserError(f"static: granularity {given!r} has no static range, only 'tensor' has")
        if self.sites == "full" and not self.static:
            raise UserError("sites: 'full' needs static=True; a dynamic scheme has only 'linear'")
        alpha = self.smooth_alpha
        if alpha is not None and (isinstance(alpha, bool) or not 0 <= alpha <= 1):
            raise UserError(f"smooth_alpha: {alpha!r} is not a number from 0 to 1")
        if alpha is not None and self.rotation != "none":
            raise UserError(
                f"smooth_alpha: {alpha} does not go with rotation {self.rotation!r}, which leaves"
                " no channels to smooth; choose one"
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether `quantize` must be given text to look at."""
        return self.static or self.smooth_alpha is not None or self.rounding == "gptq"

    def vary(self, changes: Mapping[str, Any]) -> Scheme:
        """With some fields changed; `weight.bits` names a field of a grid.

        Raises:
            UserError: on an unknown field or value.
        """
        fields = self.to_dict()
        for name, value in changes.items():
            grid, _, last = name.rpartition(".")
            if grid not in ("weight", "activation"):
                known, last = fields, name
            elif fields[grid] is None:
                raise UserError(f"{name}: {self.name!r} has no such grid to change")
            else:
                known = fields[grid]
            check_choice("scheme field", last, known)
            known[last] = value
        try:
            return Scheme.from_dict(fields)
        except (TypeError, AttributeError) as error:
            raise UserError(f"scheme: {dict(changes)} does not fit ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Scheme:
        """The scheme that `to_dict` described."""
        grids = {
            name: Grid(**fields[name]) if fields[name] else None
            for name in ("weight", "activation")
        }
        return cls(**(fields | grids))


def _symmetric(bits: int, granularity: str, group_size: int | None = None) -> Grid:
    return Grid(bits=bits, symmetric=True, granularity=granularity, group_size=group_size)


def _per_token(bits: int) -> Grid:
    return Grid(bits=bits, symmetric=False, granularity="token")


_LITERATURE: dict[str, Any] = {
    "weight": _symmetric(8, "tensor"),
    "activation": Grid(bits=8, symmetric=False),
    "static": True,
}
_TABLE = (
    # The outlier literature (Bondarenko et al. 2023, 2306.12929), and the same on linear layers.
    Scheme(name="w8a8-static", sites="full", **_LITERATURE),
    Scheme(name="w8a8-static-linear", **_LITERATURE),
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
