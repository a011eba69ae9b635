"""The rounding error of an 8-bit range, relative to the values that it rounds."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 255  # of an 8-bit range
OUTLIER = 64.0
"""A token is an outlier if its max|x| exceeds this many times that of the median token
(PrefixQuant 2410.05265, section 4.1)."""


def rounding_noise(low: Tensor, high: Tensor, signal: Tensor) -> Tensor:
    """(r / 255)^2 / (12 s), float64, of the shape of the arguments.

    r^2 / 255^2 / 12 is the mean square of rounding errors that are uniform within a step of an
    asymmetric range.

    Args:
        low, high: the smallest and the largest value that the range covers; it includes 0, and r is
            its width.
        signal: s, the mean square of the values of interest.
    """
    # In float64 from here on: in float16 the width may overflow, and s be too small for its range.
    step = (high.double().clamp(min=0) - low.double().clamp(max=0)) / STEPS
    return step.square() / (12 * signal.double().clamp(min=torch.finfo(torch.float32).tiny))
