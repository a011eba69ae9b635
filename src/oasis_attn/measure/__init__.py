"""Measuring a model's sinks and outliers: `diagnose(model, text)`."""

from __future__ import annotations

from oasis_attn.measure.diagnose import diagnose
from oasis_attn.measure.joint import compare_joint

__all__ = ["compare_joint", "diagnose"]
