"""Quantise a model: schemes as data, simulated at any width, or in integers through torchao.

What needs transformers is imported on first use, for `saved` is imported while transformers is.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from oasis_attn.quantization.grids import Grid
from oasis_attn.quantization.schemes import Scheme, schemes

_HOMES = {
    "QuantizedCache": "oasis_attn.quantization.kv_cache",
    "linear_sites": "oasis_attn.quantization.sites",
    "quantize": "oasis_attn.quantization.simulate",
    "quantized_sites": "oasis_attn.quantization.simulate",
    "scheme_sites": "oasis_attn.quantization.simulate",
    "tensor_sites": "oasis_attn.quantization.sites",
}

__all__ = ["Grid", "Scheme", "schemes", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
