"""Measure attention sinks and outliers of a model: `diagnose(model, text)`."""

from __future__ import annotations

from oasis_attn.measure.diagnose import diagnose
from oasis_attn.measure.joint_distribution import compare_joint

__all__ = ["compare_joint", "diagnose"]
