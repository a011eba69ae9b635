"""Quantise a model: schemes as data, simulated at any width, or in integers through torchao.

What needs transformers is imported on first use, for `saved` is imported while transformers is.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from oasis_attn.quantization.grids import Grid
from oasis_attn.quantization.schemes import Scheme, schemes

if TYPE_CHECKING:  # what `__getattr__` imports, for type checkers
    from oasis_attn.quantization.kv_cache import QuantizedCache
    from oasis_attn.quantization.simulate import quantize, quantized_sites, scheme_sites
    from oasis_attn.quantization.sites import linear_sites, tensor_sites

_HOMES = {
    "QuantizedCache": "oasis_attn.quantization.kv_cache",
    "linear_sites": "oasis_attn.quantization.sites",
    "quantize": "oasis_attn.quantization.simulate",
    "quantized_sites": "oasis_attn.quantization.simulate",
    "scheme_sites": "oasis_attn.quantization.simulate",
    "tensor_sites": "oasis_attn.quantization.sites",
}

__all__ = [
    "Grid",
    "QuantizedCache",
    "Scheme",
    "linear_sites",
    "quantize",
    "quantized_sites",
    "scheme_sites",
    "schemes",
    "tensor_sites",
]

if not TYPE_CHECKING:  # to type checkers it would say that every name exists

    def __getattr__(name: str):
        if name in _HOMES:
            return getattr(import_module(_HOMES[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
