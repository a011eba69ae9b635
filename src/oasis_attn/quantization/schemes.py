"""Quantization schemes as data: what is quantized, with how many bits, and by which method.

This module does not import torch, so that a command can check its options at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from oasis_attn.errors import UserError, check_at_least, check_choice, shown
from oasis_attn.quantization.spec import FLOAT_TYPES, QuantSpec

OBSERVERS = ("minmax", "running_minmax", "percentile", "mse")
TARGETS = ("linear", "full")
ROTATIONS = ("none", "folded", "hadamard", "inputs", "groups", "fitted")
ROUNDINGS = ("nearest", "gptq")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A quantization scheme.  `dataclasses.replace` and `with_options` make variants of it.

    Attributes:
        name: the name in records and error messages.
        weight: the format of the weights [out, in] of linear layers.
        activation: the format of activations [..., in]; None leaves activations unquantized.
        static: true for one fixed range per tensor, found on calibration data; false for a range
            that is computed from each input.  With `e4m3` scales, the scales of groups are computed
            from each input in either case; the range of the tensor that they are relative to is not
            if true.
        observer: a name in `OBSERVERS`, for weights and static ranges; dynamic ranges are min-max.
        targets: `linear` quantizes the weights and inputs of linear layers; `full` also quantizes
            the tensors between linear layers, see `tensor_targets`.
        head: also quantize the output head.
        smooth_alpha: migration strength of SmoothQuant (2211.10438), which moves outliers from
            activations to weights before quantization: 0 moves nothing, 1 everything; None
            disables it.
        rotation: `hadamard` rotates the residual stream and the MLP's inner activations before
            quantization, to spread outliers over all channels (QuaRot, 2404.00456).  `folded`
            rotates only what weights alone can rotate, the residual stream and the value heads (R1
            and R2 of SpinQuant, 2405.16406): it needs nothing at run time.  `inputs`
            rotates the input of every linear layer at run time: it is slower, works for any family,
            and is more accurate at 4 bits.  `groups` does so within each group of channels that
            share a scale (2509.23202).  `fitted` multiplies the same inputs by the matrices with
            the smallest error, computed from calibration data (after WUSH, 2512.00956): it is the
            most accurate, and the slowest.
        rounding: of weights: `nearest`, or `gptq` (2210.17323), which minimizes the change of each
            layer's output.
        fused_scales: with `e4m3` scales, the weights that engines multiply by as one matrix (query,
            key and value; gate and up) share the scale of the whole tensor, as their kernels need.
        clip_ratio: dynamic ranges are this fraction of the range from minimum to maximum; larger
            values are clipped (QuaRot uses 0.9 for 4 bits).

    Raises:
        UserError: a value is not allowed, or two values exclude each other.
    """

    name: str
    weight: QuantSpec
    activation: QuantSpec | None
    static: bool = False
    observer: str = "minmax"
    targets: str = "linear"
    head: bool = False
    smooth_alpha: float | None = None
    rotation: str = "none"
    rounding: str = "nearest"
    fused_scales: bool = False
    clip_ratio: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise UserError(f"name: {shown(self.name)} is not text")
        check_choice("observer", self.observer, OBSERVERS)
        check_choice("targets", self.targets, TARGETS)
        check_choice("rotation", self.rotation, ROTATIONS)
        check_choice("rounding", self.rounding, ROUNDINGS)
        for name in ("static", "head", "fused_scales"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}: {getattr(self, name)!r} is neither true nor false")
        if not isinstance(self.weight, QuantSpec):
            raise UserError(f"weight: {self.weight!r} is no format; only activations can be None")
        if self.weight.granularity == "token":
            raise UserError("weight: granularity 'token' is for activations; use 'channel'")
        activation = self.activation
        if not isinstance(activation, QuantSpec | None):
            raise UserError(f"activation: {shown(activation)} is neither a format nor None")
        granularity = activation.granularity if activation else None
        if granularity == "channel":
            raise UserError("activation: granularity 'channel' is for weights; use 'token'")
        if self.fused_scales and self.weight.scale_type != "e4m3":
            raise UserError(
                f"fused_scales: True is for weights with scale_type 'e4m3', not"
                f" {self.weight.scale_type!r}; use False"
            )
        if self.static and activation is None:
            raise UserError("static: True is for activations, which are not quantized; use False")
        if self.static and activation and not activation.has_static_scale:
            raise UserError(
                f"static: granularity {granularity!r} has no static range; it must be 'tensor'"
            )
        if self.static and granularity == "group" and self.observer == "mse":
            raise UserError(
                "observer: 'mse' does not go with static ranges of groups, whose scales are"
                " computed from each input; use 'minmax'"
            )
        if self.targets == "full" and not self.static:
            raise UserError(
                "targets: 'full' needs static ranges; a dynamic scheme can only have 'linear'"
            )
        if self.targets == "full" and granularity == "group":
            raise UserError(
                "targets: 'full' quantizes attention probabilities, whose rows are not divisible"
                " into groups; activation.granularity must be 'tensor'"
            )
        if self.rotation == "groups" and self.group_size is None:
            raise UserError(
                "rotation: 'groups' needs weights and activations with one group_size; they have"
                f" {self.weight.group_size} and {activation and activation.group_size}"
            )
        alpha = self.smooth_alpha
        if alpha is not None:
            check_at_least("smooth_alpha", alpha, 0, 1)
        ratio = self.clip_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise UserError(f"clip_ratio: {ratio!r} is not a number above 0, up to 1")
        if ratio != 1 and (self.static or self.activation is None):
            raise UserError(f"clip_ratio: {ratio} is for dynamic ranges; this scheme has none")
        if alpha is not None and self.rotation != "none":
            raise UserError(
                f"smooth_alpha: {alpha} does not go with rotation {self.rotation!r}, which mixes"
                " the channels that smoothing would scale; choose one of the two"
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether `quantize` needs calibration data."""
        calibrated = self.rotation == "fitted" or self.rounding == "gptq"
        return self.static or self.smooth_alpha is not None or calibrated

    @property
    def group_size(self) -> int | None:
        """The group size of weights and activations; None if they do not have the same."""
        size = self.weight.group_size
        return size if self.activation and self.activation.group_size == size else None

    @property
    def rotated_together(self) -> int | None:
        """The number of channels that rotated inputs mix; None for all of a layer."""
        return self.group_size if self.rotation == "groups" else None

    @property
    def simulated_only(self) -> str:
        """Why no int8 kernel computes this scheme; empty if there are kernels."""
        weight, activation = self.weight, self.activation
        if self.targets == "full":
            return "no kernel quantizes between linear layers"
        if weight.element_type != "int" or (activation and activation.element_type != "int"):
            return "kernels multiply integers only"
        if weight.bits != 8 or activation is None or activation.bits != 8:
            return "kernels multiply 8-bit weights by 8-bit activations only"
        if not weight.symmetric or weight.granularity not in ("tensor", "channel"):
            return "kernels need symmetric weights with one scale per tensor or channel"
        if not self.static and (activation.symmetric or activation.granularity != "token"):
            return "kernels need asymmetric ranges per token, or static ones"
        if self.clip_ratio != 1:
            return "kernels do not clip dynamic ranges"
        return ""

    def with_options(self, options: Mapping[str, Any]) -> Scheme:
        """A copy with some fields changed; `weight.bits` names a field of `weight`.

        Raises:
            UserError: an unknown field or a value that is not allowed.
        """
        fields = self.to_dict()
        for name, value in options.items():
            parent, _, last = name.rpartition(".")
            formats = {each: fields[each] for each in ("weight", "activation")}
            if formats.get(parent, fields) is None:
                raise UserError(f"{name}: scheme {self.name!r} does not quantize activations")
            dotted = [
                f"{each}.{field}"
                for each, spec in formats.items()
                for field in spec or ()
                if parent == each or name == field
            ]
            check_choice("options", name, dotted if parent in formats else [*fields, *dotted])
            known = formats.get(parent, fields)
            if last in ("weight", "activation"):
                spec = _spec(last, value)
                value = spec and asdict(spec)
            known[last] = value
        return Scheme.from_dict(fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Scheme:
        """The scheme that `to_dict` described."""
        specs = {name: _spec(name, fields[name]) for name in ("weight", "activation")}
        return cls(**(fields | specs))


def _spec(name: str, given: object) -> QuantSpec | None:
    """The format of `weight` or `activation` from its fields; None for unquantized activations."""
    if given is None and name == "activation":
        return None
    if not isinstance(given, Mapping):
        also = " or null" if name == "activation" else ""
        raise UserError(
            f"{name}: {shown(given)} is not a mapping with the fields of a format{also}; to change"
            f" one field, use its name, such as {name}.bits=4"
        )
    for field in given:
        check_choice(name, field, [each.name for each in fields(QuantSpec)])
    for field in ("bits", "symmetric"):
        if field not in given:
            raise UserError(f"{name}: {shown(dict(given))} lacks the field {field!r}")
    try:
        return QuantSpec(**given)
    except UserError as error:
        raise UserError(f"{name}.{error}") from error


def _symmetric(bits: int, granularity: str, group_size: int | None = None) -> QuantSpec:
    return QuantSpec(bits=bits, symmetric=True, granularity=granularity, group_size=group_size)


def _per_token(bits: int) -> QuantSpec:
    return QuantSpec(bits=bits, symmetric=False, granularity="token")


_STATIC: dict[str, Any] = {
    "weight": _symmetric(8, "tensor"),
    "activation": QuantSpec(bits=8, symmetric=False),
    "static": True,
}


def _float(element_type: str, granularity: str, **groups: Any) -> QuantSpec:
    bits = FLOAT_TYPES[element_type].bits
    return QuantSpec(
        bits=bits, symmetric=True, granularity=granularity, element_type=element_type, **groups
    )


_NVFP4 = _float("e2m1", "group", group_size=16, scale_type="e4m3")
_MXFP4, _MXFP8 = (
    _float(element, "group", group_size=32, scale_type="e8m0") for element in ("e2m1", "e4m3")
)
_TABLE = (
    # After the outlier literature (Bondarenko et al. 2023, 2306.12929); docs/quantization.md lists
    # the differences.
    Scheme(name="w8a8-static-full", targets="full", **_STATIC),
    Scheme(name="w8a8-static-linear", **_STATIC),
    # Round to nearest, activations per token (Yao et al. 2022, 2206.01861).
    Scheme(name="w8a8-dynamic", weight=_symmetric(8, "channel"), activation=_per_token(8)),
    Scheme(name="w4a8", weight=_symmetric(4, "channel"), activation=_per_token(8)),
    Scheme(name="w4a4", weight=_symmetric(4, "channel"), activation=_per_token(4)),
    # Groups of 32 divide the width of small models; the usual group size of 128 does not.
    Scheme(name="w4a16", weight=_symmetric(4, "group", 32), activation=None),
    # What the hardware of 2023 and later multiplies.  FP8 (Micikevicius et al. 2022, 2209.05433).
    Scheme(
        name="fp8-static",
        weight=_float("e4m3", "tensor"),
        activation=_float("e4m3", "tensor"),
        static=True,
    ),
    Scheme(
        name="fp8-dynamic", weight=_float("e4m3", "channel"), activation=_float("e4m3", "token")
    ),
    # OCP Microscaling Formats (MX) 1.0; MXFP8 with E4M3 elements.
    Scheme(name="mxfp8", weight=_MXFP8, activation=_MXFP8),
    Scheme(name="mxfp4", weight=_MXFP4, activation=_MXFP4),
    # NVIDIA (2509.25149), with the range of the whole tensor from calibration.
    Scheme(name="nvfp4", weight=_NVFP4, activation=_NVFP4, static=True),
)


def schemes() -> dict[str, Scheme]:
    """The schemes by name."""
    return {scheme.name: scheme for scheme in _TABLE}


def get_scheme(scheme: str | Scheme) -> Scheme:
    """The scheme of that name; a `Scheme` is returned unchanged.

    Raises:
        UserError: an unknown name.
    """
    if isinstance(scheme, Scheme):
        return scheme
    check_choice("scheme", scheme, schemes())
    return schemes()[scheme]
