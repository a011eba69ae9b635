"""Depth routing: the weight each router gives each source.

Axes: B windows, T tokens, S sources.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Depth:
    """The depth.* measures of one pass over windows."""

    def __init__(self) -> None:
        self._weights: dict[int, list[Tensor]] = {}

    def see(self, router: int, weights_BTS: Tensor) -> None:
        """Take in one router's weights; source 0 is the embedding."""
        means_BS = weights_BTS.mean(dim=1, dtype=torch.float64)
        self._weights.setdefault(router, []).append(means_BS.cpu())

    def tables(self) -> dict[str, Any]:
        """`depth.weights` [router][source], where the model routes over depth."""
        if not self._weights:
            return {}
        rows = [torch.cat(means).mean(0).tolist() for _, means in sorted(self._weights.items())]
        return {"depth.weights": rows}
