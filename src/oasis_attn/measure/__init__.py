"""Measuring a model's sinks and outliers: `diagnose(model, text) -> Record`."""

from __future__ import annotations

from oasis_attn.measure.diagnose import diagnose

__all__ = ["diagnose"]
