"""What an 8-bit range does to the values of an ordinary token, and which tokens are to blame.

One range for a whole tensor must reach its largest value; a range for each token does not.  The
noise of a range is the mean square of its rounding errors over the mean square of the median token
(`rounding_noise`).  At a noise of 1, the values of the median token are lost.

Axes: N windows, B windows in a batch, L layers, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oasis_attn.measure.hooks import HookPoint
from oasis_attn.measure.statistics import mean_metric
from oasis_attn.ops.rounding_noise import OUTLIER, rounding_noise
from oasis_attn.records import Metric

KINDS = ("static", "static_rest", "dynamic")
"""One range per tensor; the same without the outlier tokens; one range per token."""
ROWS = 10  # of the table of outlier tokens


class RangeNoise:
    """Computes the range.* metrics during one pass over the windows.

    An outlier token is one whose max|x| exceeds 64 times that of the median token of its window, in
    the output of a layer.
    """

    def __init__(self, points: list[HookPoint]) -> None:
        self._layers = [point.name for point in points if point.kind == "layer"]
        self._batch: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._noise: dict[str, dict[str, list[Tensor]]] = {
            kind: {point.name: [] for point in points} for kind in KINDS
        }
        self._counts: list[Tensor] = []
        self._found: dict[tuple[int, int], list[Tensor]] = {}

    def update(self, point: HookPoint, x_BTD: Tensor) -> None:
        """Add the output of one module."""
        x_BTD = x_BTD.detach()
        precise = torch.promote_types(x_BTD.dtype, torch.float32)
        power_BT = torch.linalg.vector_norm(x_BTD, dim=-1, dtype=precise) ** 2 / x_BTD.shape[-1]
        self._batch[point.name] = x_BTD.amin(-1), x_BTD.amax(-1), power_BT

    def classify(self, ids_BT: Tensor) -> None:
        """Find the outlier tokens of a batch, and the noise with and without them."""
        batch, self._batch = self._batch, {}
        ends = [batch[name][:2] for name in self._layers]
        ratio_LBT = torch.stack([_over_median(torch.maximum(-low, high)) for low, high in ends])
        outlier_BT = (ratio_LBT > OUTLIER).any(0)
        for name, (low_BT, high_BT, power_BT) in batch.items():
            signal_B = power_BT.median(-1).values
            rest = low_BT.masked_fill(outlier_BT, 0), high_BT.masked_fill(outlier_BT, 0)
            noises = (
                rounding_noise(low_BT.amin(-1), high_BT.amax(-1), signal_B),
                rounding_noise(rest[0].amin(-1), rest[1].amax(-1), signal_B),
                rounding_noise(low_BT, high_BT, power_BT).median(-1).values,
            )
            for kind, noise_B in zip(KINDS, noises, strict=True):
                # Rounding leaves a token of zeros as it is.
                self._noise[kind][name].append(noise_B.masked_fill(signal_B == 0, 0).cpu())
        broken_B = ratio_LBT.isnan().any(0).any(-1)
        self._counts.append(outlier_BT.sum(1).double().masked_fill(broken_B, torch.nan).cpu())
        for window, position in outlier_BT.nonzero().tolist():
            key = position, int(ids_BT[window, position])
            self._found.setdefault(key, []).append(ratio_LBT[:, window, position].float().cpu())

    def metrics(self) -> list[Metric]:
        """The mean of each kind of noise over the tensors, and the number of outlier tokens."""
        metrics = [mean_metric("range.outlier_tokens", torch.cat(self._counts))]
        for kind, found in self._noise.items():
            noise_N = torch.stack([torch.cat(batches) for batches in found.values()]).mean(0)
            metrics.append(mean_metric(f"range.noise_{kind}", noise_N))
        return metrics

    def tables(self) -> dict[str, Any]:
        """`range.noise` and `range.outlier_tokens`.

        `range.noise` has one row per tensor, with the three kinds of noise, each a mean over
        windows.  `range.outlier_tokens` has the ten worst outlier tokens, one row per position and
        token, with the number of `windows` in which the token is an outlier, its largest `ratio` to
        the median token, and the `layers` in which it is one.
        """
        rows = [
            _row(position, token, torch.stack(ratios))
            for (position, token), ratios in self._found.items()
        ]
        rows.sort(key=lambda row: row["windows"] * row["ratio"], reverse=True)
        return {
            "range.noise": [
                {"tensor": name}
                | {kind: float(torch.cat(self._noise[kind][name]).mean()) for kind in KINDS}
                for name in self._noise["static"]
            ],
            "range.outlier_tokens": rows[:ROWS],
        }


def _over_median(peak_BT: Tensor) -> Tensor:
    """The max|x| of each token over that of the median token; 0 where that is 0."""
    peak_BT = peak_BT.to(torch.promote_types(peak_BT.dtype, torch.float32))  # float16 may overflow
    median_B1 = peak_BT.median(-1, keepdim=True).values
    return (peak_BT / median_B1).masked_fill(median_B1 == 0, 0)


def _row(position: int, token: int, ratio_NL: Tensor) -> dict[str, Any]:
    return {
        "position": position,
        "token": token,
        "windows": len(ratio_NL),
        "ratio": float(ratio_NL.max()),
        "layers": (ratio_NL > OUTLIER).any(0).nonzero().flatten().tolist(),
    }
