"""Quantise a model, simulated in floating point: grids, range estimators, schemes, sites."""

from __future__ import annotations

from oasis_attn.quantization.grids import Grid
from oasis_attn.quantization.schemes import Scheme, schemes
from oasis_attn.quantization.simulate import linear_sites, quantize, quantized_sites

__all__ = ["Grid", "Scheme", "linear_sites", "quantize", "quantized_sites", "schemes"]
