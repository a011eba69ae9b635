"""Statistics that all measures use."""

from __future__ import annotations

import math

from torch import Tensor

from oasis_attn.records import Metric


def mean_metric(name: str, samples: Tensor, where: str = "") -> Metric:
    """The mean of `samples` [N] and its standard error (None for a single sample)."""
    samples = samples.double()
    n = len(samples)
    error = float(samples.std(unbiased=True)) / math.sqrt(n) if n > 1 else None
    return Metric(name=name, value=float(samples.mean()), where=where, n=n, standard_error=error)
