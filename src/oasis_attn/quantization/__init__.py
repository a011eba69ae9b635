"""Quantize a model with a scheme: simulated at 2 to 8 bits, or in int8 through torchao.

Modules that need torch or transformers are imported on first use: options can be checked without
them, and `hf_quantizer` is imported while transformers itself is being imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from oasis_attn.lazy import import_on_first_use
from oasis_attn.quantization.schemes import Scheme, schemes
from oasis_attn.quantization.spec import QuantSpec

if TYPE_CHECKING:  # for type checkers: the names that `__getattr__` imports
    from oasis_attn.quantization.compressed_tensors_format import save_compressed_tensors
    from oasis_attn.quantization.kv_cache import QuantizedCache
    from oasis_attn.quantization.simulate import quantize, quantized_modules, scheme_targets
    from oasis_attn.quantization.targets import linear_targets, tensor_targets
    from oasis_attn.quantization.torchao_format import save_torchao

_HOMES = {
    "QuantizedCache": "oasis_attn.quantization.kv_cache",
    "linear_targets": "oasis_attn.quantization.targets",
    "quantize": "oasis_attn.quantization.simulate",
    "quantized_modules": "oasis_attn.quantization.simulate",
    "save_compressed_tensors": "oasis_attn.quantization.compressed_tensors_format",
    "save_torchao": "oasis_attn.quantization.torchao_format",
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
    "save_compressed_tensors",
    "save_torchao",
    "scheme_targets",
    "schemes",
    "tensor_targets",
]

if not TYPE_CHECKING:  # type checkers would conclude that every name exists
    __getattr__ = import_on_first_use(__name__, _HOMES)
