"""Secondary sinks: later tokens whose state turns to the first token's (arXiv 2512.22213).

Axes: B windows, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oasis_attn.measure.statistics import mean_metric
from oasis_attn.records import Metric

COSINE = 0.9
LARGE = 3.0  # our reading of "the first token's norm is large": over the median of the others'


class SecondarySinks:
    """Tokens t > 0 with a cosine above 0.9 to the first token, in layers where that one is large.

    A token's creation layer is the first of a run of such layers, its lifetime the run's length.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._ratios: list[list[Tensor]] = [[] for _ in range(layers)]
        self._counts: list[Tensor] = []
        self._rows: dict[tuple[int, int, int], dict[str, int]] = {}

    def see(self, layer: int, x_BTD: Tensor, ids_BT: Tensor) -> None:
        """Take in the output of decoder layer `layer`; 0, 1, ... in turn."""
        x_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        norms_BT = torch.linalg.vector_norm(x_BTD, dim=-1)
        ratio_B = norms_BT[:, 0] / norms_BT[:, 1:].median(dim=-1).values
        self._ratios[layer].append(ratio_B.cpu())
        dots_BT = (x_BTD @ x_BTD[:, 0, :, None]).squeeze(-1)
        alive_BT = dots_BT > COSINE * norms_BT * norms_BT[:, :1]
        alive_BT &= (ratio_B >= LARGE)[:, None]
        alive_BT[:, 0] = False
        if layer == 0:
            self._born_BT = torch.full_like(ids_BT, -1)
            self._ever_BT = torch.zeros_like(alive_BT)
        self._ever_BT |= alive_BT
        self._end(~alive_BT, layer, ids_BT)
        self._born_BT[alive_BT & (self._born_BT < 0)] = layer
        if layer == self._layers - 1:
            self._end(torch.ones_like(alive_BT), self._layers, ids_BT)
            self._counts.append(self._ever_BT.sum(-1).cpu())

    def _end(self, dead_BT: Tensor, layer: int, ids_BT: Tensor) -> None:
        """Close the runs of the tokens that are no sinks from `layer` on."""
        ended_BT = dead_BT & (self._born_BT >= 0)
        for sequence, position in ended_BT.nonzero().tolist():
            born = int(self._born_BT[sequence, position])
            key = (born, layer - born, int(ids_BT[sequence, position]))
            row = self._rows.setdefault(key, {"count": 0, "first_position": position})
            row["count"] += 1
            row["first_position"] = min(row["first_position"], position)
        self._born_BT[ended_BT] = -1

    def metrics(self) -> list[Metric]:
        """`sink.secondary`: such tokens per window."""
        return [mean_metric("sink.secondary", torch.cat(self._counts))]

    def tables(self) -> dict[str, Any]:
        """`sink.first_norm_ratio` [L], the first token's norm over the median of the others'; and
        `sink.secondary`, one row per creation layer, lifetime and token."""
        return {
            "sink.first_norm_ratio": [
                float(torch.cat(ratios).double().mean()) for ratios in self._ratios
            ],
            "sink.secondary": [
                {"created": born, "lifetime": lifetime, "token": token} | row
                for (born, lifetime, token), row in sorted(self._rows.items())
            ],
        }
