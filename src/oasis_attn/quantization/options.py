"""Checks of the options of quantization, without torch, so that wrong ones are refused at once."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

from oasis_attn.errors import UserError, check_at_least, check_choice, check_seed, check_whole
from oasis_attn.quantization.schemes import Scheme

OASIS, COMPRESSED_TENSORS, TORCHAO = FORMATS = ("oasis", "compressed-tensors", "torchao")
AUTO = "auto"
"""Not a format: `compressed-tensors` if it can hold the scheme and the model, or else `oasis`."""
_LIBRARIES = {COMPRESSED_TENSORS: ("compressed_tensors", "export"), TORCHAO: ("torchao", "int8")}
"""By format: the library that writes it, and the extra that installs this library."""
KV_CACHES = ("fp8",)
"""Formats of a key-value cache that the format compressed-tensors describes."""
PREFIX_METHODS = ("greedy", "frequency")
SENSITIVITY_GROUPS = ("kind", "layer", "target")
KV_BITS = (2, 4, 8)
KV_GROUP = 32
"""Numbers that share a scale in `QuantizedCache`."""
KV_FIRST, KV_RECENT = 32, 96
"""Default numbers of tokens at the start and at the end that `QuantizedCache` does not quantize."""


# Of compressed-tensors: element type, scale type and group size of weights and activations.
NVFP4_FORMAT = "nvfp4-pack-quantized"
_FLOAT_FORMATS = {
    ("e4m3", "float32", None): "float-quantized",
    ("e4m3", "e8m0", 32): "mxfp8-quantized",
    ("e2m1", "e8m0", 32): "mxfp4-pack-quantized",
    ("e2m1", "e4m3", 16): NVFP4_FORMAT,
}

_ROTATED = (
    "transformers does not apply rotation {!r} to inputs on loading; use the scheme option"
    " rotation=folded, which needs nothing at run time"
)


class Choice(NamedTuple):
    """The format to write, and why it is not `compressed-tensors` if `auto` could not choose it."""

    format: str
    fallback: str = ""


def check_has_kernels(scheme: Scheme, fallback: str = "") -> None:
    """Raise `UserError` if no int8 kernel computes `scheme`; `fallback` is that of the `Choice`."""
    if scheme.simulated_only:
        raise UserError(
            f"scheme: {scheme.name!r} can only be simulated: {scheme.simulated_only};"
            f" {simulate_hint(fallback)}"
        )


def simulate_hint(fallback: str) -> str:
    """What to do if no int8 kernel can be used for the format `oasis`."""
    hint = "add --simulate (simulate=True)"
    return f"{hint} for the format 'oasis', because {fallback}" if fallback else hint


def check_format(format: str, scheme: Scheme) -> None:
    """Raise `UserError` if `format` is unknown, lacks its library or cannot hold `scheme`."""
    check_choice("format", format, (AUTO, *FORMATS))
    if format not in _LIBRARIES:
        return
    if not _has_library(format):
        extra = _LIBRARIES[format][1]
        raise UserError(
            f"format: {format!r} needs the library of this name: pip install 'oasis-attn[{extra}]'"
        )
    if reason := torchao_reason(scheme) if format == TORCHAO else scheme_reason(scheme):
        raise UserError(f"format: {format!r} cannot hold scheme {scheme.name!r}: {reason}")


def choose_format(format: str, scheme: Scheme) -> Choice:
    """What to write for `format`; of `auto`, as far as that can be known without the model."""
    if format != AUTO:
        return Choice(format)
    if reason := scheme_reason(scheme):
        return Choice(OASIS, cannot_hold("scheme", reason))
    if not _has_library(COMPRESSED_TENSORS):
        missing = "compressed-tensors is not installed: pip install 'oasis-attn[export]'"
        return Choice(OASIS, missing)
    return Choice(COMPRESSED_TENSORS)


def cannot_hold(what: str, reason: str) -> str:
    """Why `auto` writes `oasis`: compressed-tensors cannot hold the `scheme` or `model`."""
    return f"compressed-tensors cannot hold the {what}: {reason}"


def _has_library(format: str) -> bool:
    return find_spec(_LIBRARIES[format][0]) is not None


def scheme_reason(scheme: Scheme) -> str | None:
    """Why the format compressed-tensors cannot hold `scheme`; None if it can."""
    types = {spec.element_type for spec in (scheme.weight, scheme.activation) if spec}
    if scheme.targets == "full":
        return "it quantizes linear layers only; use the scheme option targets=linear"
    if scheme.rotation not in ("none", "folded"):
        return _ROTATED.format(scheme.rotation)
    if scheme.clip_ratio != 1:
        return "it does not clip dynamic ranges; use the scheme option clip_ratio=1"
    if scheme.activation is None and not scheme.weight.symmetric:
        return "transformers cannot load packed weights with zero points; use symmetric weights"
    if types != {"int"} and not float_format(scheme):
        return (
            "of floating-point elements, it has FP8, MXFP4, MXFP8 and NVFP4, the same for weights"
            " and activations"
        )
    if float_format(scheme) == NVFP4_FORMAT and scheme.activation and not scheme.static:
        return "its NVFP4 has a fixed range of the tensor; use the scheme option static=true"
    return None


def vllm_computes(scheme: Scheme) -> bool:
    """Whether vLLM computes `scheme` from compressed-tensors, on some hardware."""
    weight, activation = scheme.weight, scheme.activation
    if activation is None or activation.element_type != "int":
        return True
    if not weight.symmetric or not (scheme.static or activation.granularity == "token"):
        return False
    if (weight.bits, activation.bits) == (8, 8):
        return weight.granularity != "group"
    dynamic = not scheme.static and weight.granularity != "tensor"
    return dynamic and (weight.bits, activation.bits) == (4, 8)


def torchao_reason(scheme: Scheme) -> str | None:
    """Why the format torchao cannot hold `scheme`; None if it can."""
    if scheme.static:
        return (
            "transformers does not load static ranges of torchao; use the scheme w8a8-dynamic, or"
            " another format"
        )
    if scheme.simulated_only:
        return f"{scheme.simulated_only}; use another format"
    if scheme.rotation not in ("none", "folded"):
        return _ROTATED.format(scheme.rotation)
    return None


def float_format(scheme: Scheme) -> str:
    """The format of compressed-tensors for the floating-point elements of `scheme`; empty if none.

    Activations have the format of the weights, or stay unquantized.
    """
    found = {
        _FLOAT_FORMATS.get((spec.element_type, spec.scale_type, spec.group_size), "")
        for spec in (scheme.weight, scheme.activation)
        if spec
    }
    return found.pop() if len(found) == 1 else ""


def check_quantization(
    scheme: Scheme,
    *,
    format: str,
    simulate: bool,
    window: int,
    windows: int,
    sensitivity: str | None,
    seed: int,
    kv_cache: str | None,
) -> None:
    """Raise `UserError` for an option that `quantize_checkpoint` cannot use with any model."""
    if sensitivity is not None:
        check_choice("sensitivity", sensitivity, SENSITIVITY_GROUPS)
    check_whole("window", window, 2)
    check_whole("windows", windows, 1)
    check_seed("seed", seed)
    if kv_cache is not None:
        check_choice("kv_cache", kv_cache, KV_CACHES)
        if format in (OASIS, TORCHAO):
            raise UserError(
                f"kv_cache: {kv_cache!r} needs the format {COMPRESSED_TENSORS!r}, not {format!r}"
            )
        format = COMPRESSED_TENSORS
        try:
            check_format(format, scheme)
        except UserError as error:
            raise UserError(f"kv_cache: {kv_cache!r} cannot be written: {error}") from None
    check_format(format, scheme)
    if format == TORCHAO and simulate:
        raise UserError(
            f"simulate: format {format!r} computes with int8 kernels; leave out --simulate"
            " (simulate=False), or use another format"
        )
    choice = choose_format(format, scheme)
    if choice.format == OASIS and not simulate:
        check_has_kernels(scheme, choice.fallback)


def check_doctor(*, tolerance: float, window: int, windows: int, seed: int) -> None:
    """Raise `UserError` for an option that `doctor` cannot use with any model."""
    check_at_least("tolerance", tolerance, 0)
    check_whole("window", window, 2)
    check_whole("windows", windows, 1)
    check_seed("seed", seed)


def check_prefix(
    scheme: Scheme, *, method: str, length: int, tune_steps: int, window: int, windows: int
) -> None:
    """Raise `UserError` for an option that `prefix_checkpoint` cannot use with any model."""
    check_choice("method", method, PREFIX_METHODS)
    if not scheme.static:
        raise UserError(
            f"scheme: {scheme.name!r} is not static; a prefix helps static schemes only"
        )
    check_whole("length", length, 1)
    check_whole("tune_steps", tune_steps, 0)
    check_whole("window", window, 2)
    check_whole("windows", windows, 1)


def check_kv_bits(bits: object) -> None:
    """Raise `UserError` unless `QuantizedCache` supports this number of bits."""
    if isinstance(bits, bool) or bits not in KV_BITS:
        raise UserError(f"bits: {bits!r} is not one of {', '.join(map(str, KV_BITS))}")


def check_kv_window(window: int) -> None:
    """Raise `UserError` if a window is so short that none of its tokens would be quantized."""
    if window < (least := KV_FIRST + KV_RECENT + KV_GROUP):
        raise UserError(
            f"window: {window} tokens are too few for a quantized cache, which does not quantize"
            f" the first {KV_FIRST} and the last {KV_RECENT} tokens; use at least {least}"
        )
