"""Quantize a model with a scheme: simulated at 2 to 8 bits, or in int8 through torchao.

Modules that need transformers are imported on first use, because `hf_quantizer` is imported while
transformers itself is being imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from oasis_attn.quantization.primitives import QuantSpec
from oasis_attn.quantization.schemes import Scheme, schemes

if TYPE_CHECKING:  # for type checkers: the names that `__getattr__` imports
    from oasis_attn.quantization.kv_cache import QuantizedCache
    from oasis_attn.quantization.simulate import quantize, quantized_modules, scheme_targets
    from oasis_attn.quantization.targets import linear_targets, tensor_targets

_HOMES = {
    "QuantizedCache": "oasis_attn.quantization.kv_cache",
    "linear_targets": "oasis_attn.quantization.targets",
    "quantize": "oasis_attn.quantization.simulate",
    "quantized_modules": "oasis_attn.quantization.simulate",
    "scheme_targets": "oasis_attn.quantization.simulate",
    "tensor_targets": "oasis_attn.quantization.targets",
}

__all__ = [
    "QuantSpec",
    "QuantizedCache",
    "Scheme",
    "linear_targets",
    "quantize",
    "quantized_modules",
    "scheme_targets",
    "schemes",
    "tensor_targets",
]

if not TYPE_CHECKING:  # type checkers would conclude that every name exists

    def __getattr__(name: str):
        if name in _HOMES:
            return getattr(import_module(_HOMES[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
