"""Activation outliers: inf-norm, kurtosis and massive activations of every hooked tensor.

Axes: B sequences, T tokens, D width; M = T * D.  A hook reduces each tensor immediately, in pieces
that fit in the processor cache; no tensor is stored.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from oasis_attn.measure.hooks import HookPoint
from oasis_attn.measure.statistics import mean_metric
from oasis_attn.records import Metric

# A massive activation exceeds MASSIVE, and MASSIVE_RATIO times the median |x| of the hidden state:
# Sun et al. 2024 (arXiv 2402.17762), section 2.
MASSIVE = 100.0
MASSIVE_RATIO = 1000.0
LITERATURE_EPSILON = 1e-6  # in the denominator of the kurtosis of the literature
SILENT = 1e-3  # largest standard deviation of a silent tensor, relative to the median tensor's
CONSTANT = 1e-12  # largest standard deviation due to rounding, relative to the root mean square
_PIECE = 1 << 16


def inf_norm(x_BM: Tensor) -> Tensor:
    """max |x| of each row, [B]; NaN if the row contains NaN."""
    return torch.maximum(x_BM.amax(-1), -x_BM.amin(-1))


def massive(x_TD: Tensor) -> Tensor:
    """Which entries of a hidden state are massive activations, bool [T, D]."""
    sizes_TD = x_TD.abs()

    def is_massive(size: float) -> bool:
        # Counting what is smaller than size / 1000 is several times faster than the median.
        return 2 * int((sizes_TD < size / MASSIVE_RATIO).sum()) > sizes_TD.numel() - 1

    if not is_massive(float(sizes_TD.max())):
        return torch.zeros_like(sizes_TD, dtype=torch.bool)
    large = sizes_TD[sizes_TD > MASSIVE].unique().tolist()
    smallest = bisect_left(large, True, key=is_massive)
    return sizes_TD >= (large[smallest] if large else torch.inf)


@dataclass(frozen=True)
class Moments:
    """Mean and central moments of each row of x / scale, all [B] float64.

    Attributes:
        count: number of values in a row.
        mean: mean of x / scale.
        second: second central moment of x / scale (the biased variance).
        fourth: fourth central moment of x / scale.
        scale: 1; for float64 inputs the power of two near the largest |x| of the row, so that
            fourth powers neither overflow nor underflow.
    """

    count: int
    mean: Tensor
    second: Tensor
    fourth: Tensor
    scale: Tensor

    @property
    def standard_deviation(self) -> Tensor:
        """The biased standard deviation of x, [B]."""
        return self.second.sqrt() * self.scale

    @property
    def constant(self) -> Tensor:
        """Whether all values of a row are equal, up to rounding in float64, [B]."""
        return self.second.sqrt() <= CONSTANT * (self.mean.square() + self.second).sqrt()


def moments(x_BM: Tensor) -> Moments:
    """The moments of each row, in float64; the mean is subtracted first, to avoid cancellation."""
    scale_B = torch.ones(len(x_BM), dtype=torch.float64, device=x_BM.device)
    if x_BM.dtype == torch.float64:
        scale_B = (torch.frexp(inf_norm(x_BM)).exponent - 1).double().exp2()
        x_BM = x_BM / scale_B[:, None]
    rows = [_moments(x_M) for x_M in x_BM]
    mean_B, second_B, fourth_B = (torch.stack(values) for values in zip(*rows, strict=True))
    return Moments(x_BM.shape[1], mean_B, second_B, fourth_B, scale_B)


def _moments(x_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pieces = x_M.split(_PIECE)
    n = x_M.numel()
    mean = second = fourth = torch.zeros((), dtype=torch.float64, device=x_M.device)
    for piece in pieces:
        mean = mean + piece.double().sum()
    mean = mean / n
    for piece in pieces:
        squares = (piece.double() - mean).square_()
        second = second + squares.sum()
        fourth = fourth + squares.dot(squares)
    return mean, second / n, fourth / n


def literature_kurtosis(row: Moments) -> Tensor:
    """mean((x - mu)^4) / (s^4 + 1e-6) of each row, [B] float64; s is unbiased.

    This is exactly the formula of Bondarenko et al. 2023 (arXiv 2306.12929), OutEffHop and OASIS.
    The 1e-6 does not scale with x: unless s^4 is much larger, the result is too low.
    """
    variance_B = row.second * (row.count / (row.count - 1))
    return row.fourth / (variance_B.square() + LITERATURE_EPSILON / row.scale**4)


def pearson_kurtosis(row: Moments) -> Tensor:
    """mean((x - mu)^4) / mean((x - mu)^2)^2 of each row, [B] float64; NaN if the row is constant.

    It does not depend on the scale of x, is at least 1, and is 3 for a normal distribution.
    """
    kurtosis_B = (row.fourth / row.second.square()).clamp_min(1)
    return kurtosis_B.masked_fill(row.constant, torch.nan)


class Outliers:
    """Computes the outlier.* metrics during one pass over the windows."""

    def __init__(self, points: list[HookPoint]) -> None:
        self._points = points
        self._inf_norms: dict[str, list[Tensor]] = {point.name: [] for point in points}
        self._moments: dict[str, list[Moments]] = {point.name: [] for point in points}
        self._non_finite = dict.fromkeys(self._inf_norms, 0)
        self._massive: dict[tuple[int, int, int], dict[str, Any]] = {}
        self._largest: dict[int, dict[str, Any]] = {}

    def update(self, point: HookPoint, x: Tensor, ids_BT: Tensor) -> None:
        """Add the output `x` of one module, [B, T, D]."""
        x_BM = x.detach().reshape(len(ids_BT), -1)
        peaks_B = inf_norm(x_BM)
        self._inf_norms[point.name].append(peaks_B)
        self._moments[point.name].append(moments(x_BM))
        for sequence, peak in enumerate(peaks_B.tolist()):
            if not abs(peak) < float("inf"):
                broken = x_BM[sequence].isfinite().logical_not().sum()
                self._non_finite[point.name] += int(broken)
            elif point.kind == "layer":
                x_TD = x_BM[sequence].view(ids_BT.shape[1], -1)
                self._record_largest(point, peak, x_TD, ids_BT[sequence])
                if peak > MASSIVE:
                    self._record_massive(point, x_TD, ids_BT[sequence])

    def _record_largest(self, point: HookPoint, peak: float, x_TD: Tensor, ids_T: Tensor) -> None:
        assert point.layer is not None
        largest = self._largest.get(point.layer)
        if largest is None or peak > abs(largest["largest"]):
            position, channel = divmod(int(x_TD.abs().argmax()), x_TD.shape[1])
            self._largest[point.layer] = {
                "channel": channel,
                "token": int(ids_T[position]),
                "position": position,
                "largest": float(x_TD[position, channel]),
            }

    def _record_massive(self, point: HookPoint, x_TD: Tensor, ids_T: Tensor) -> None:
        assert point.layer is not None
        for position, channel in massive(x_TD).nonzero().tolist():
            key = (point.layer, channel, int(ids_T[position]))
            value = float(x_TD[position, channel])
            row = self._massive.setdefault(
                key, {"count": 0, "largest": 0.0, "position": position, "first_position": position}
            )
            row["count"] += 1
            if abs(value) > abs(row["largest"]):
                row |= {"largest": value, "position": position}
            row["first_position"] = min(row["first_position"], position)

    def _rows(self, name: str) -> Moments:
        """The moments of one tensor in all N sequences; their axis is [N]."""
        batches = self._moments[name]

        def concatenated(field: str) -> Tensor:
            return torch.cat([getattr(batch, field) for batch in batches])

        return Moments(batches[0].count, *map(concatenated, ("mean", "second", "fourth", "scale")))

    def _pearson(self, name: str) -> Tensor:
        """The scale-free kurtosis of one tensor, for the sequences in which it is not constant."""
        rows = self._rows(name)
        return pearson_kurtosis(rows)[~rows.constant]

    def _silent_and_understated(self) -> tuple[list[str], list[str]]:
        """Names of the silent tensors, and of those whose literature kurtosis is understated.

        Both depend on the mean of a tensor's standard deviation over sequences.
        """
        rows = {point.name: self._rows(point.name) for point in self._points}
        sizes = torch.stack([r.standard_deviation.mean() for r in rows.values()])
        constant = torch.stack([r.constant.all() for r in rows.values()])
        silent = constant | (sizes <= SILENT * sizes.nanmedian())
        understated = sizes**4 <= LITERATURE_EPSILON
        return list(compress(rows, silent.tolist())), list(compress(rows, understated.tolist()))

    def metrics(self) -> list[Metric]:
        """The mean over sequences for each tensor, and maxima and mean kurtoses over tensors.

        The mean and maximum of the scale-free kurtosis exclude silent tensors.
        """
        inf_norms = {
            point: mean_metric(
                "outlier.max_inf_norm", torch.cat(self._inf_norms[point.name]), point.name
            )
            for point in self._points
        }
        literature = [
            mean_metric("outlier.kurtosis", literature_kurtosis(self._rows(point.name)), point.name)
            for point in self._points
        ]
        pearson = [
            mean_metric("outlier.pearson_kurtosis", kurtosis_N, point.name)
            for point in self._points
            if len(kurtosis_N := self._pearson(point.name))
        ]
        silent, understated = self._silent_and_understated()
        n = literature[0].n

        def one(name: str, value: Tensor | float, where: str = "") -> Metric:
            return Metric(name=name, value=float(value), where=where, n=n)

        def largest(kind: str = "") -> Tensor:
            return _values(m for point, m in inf_norms.items() if kind in ("", point.kind)).max()

        def counted(name: str, counts: dict[str, int]) -> list[Metric]:
            """The sum, and each count that is not 0."""
            places = [one(name, count, place) for place, count in counts.items() if count]
            return [one(name, sum(counts.values())), *places]

        kinds = {point.kind for point in self._points}
        active = _values(m for m in pearson if m.where not in silent)
        return [
            one("outlier.max_inf_norm", largest()),
            *([one("outlier.max_inf_norm_mlp", largest("mlp"))] if "mlp" in kinds else []),
            one("outlier.max_inf_norm_layer", largest("layer")),
            one("outlier.avg_kurtosis", _values(literature).mean()),
            one("outlier.max_kurtosis", _values(literature).max()),
            one("outlier.mean_pearson_kurtosis", active.mean()),
            one("outlier.max_pearson_kurtosis", active.max() if len(active) else torch.nan),
            *counted("outlier.silent_tensors", dict.fromkeys(silent, 1)),
            *counted("outlier.understated_kurtosis", dict.fromkeys(understated, 1)),
            one("outlier.massive", sum(row["count"] for row in self._massive.values())),
            *counted("outlier.non_finite", self._non_finite),
            *inf_norms.values(),
            *literature,
            *pearson,
        ]

    def tables(self) -> dict[str, Any]:
        """Tables about the outputs of the decoder layers.

        `outlier.inf_norm_layer`, `outlier.kurtosis_layer` and `outlier.pearson_kurtosis_layer` (NaN
        for a constant output), all [L]; `outlier.massive`, one row per layer, channel and token
        with massive activations, with the `largest` one and its `position`; and `outlier.largest`,
        the same for the largest activation of each layer, massive or not.
        """
        layers = [point.name for point in self._points if point.kind == "layer"]
        return {
            "outlier.inf_norm_layer": [_mean(torch.cat(self._inf_norms[name])) for name in layers],
            "outlier.kurtosis_layer": [
                _mean(literature_kurtosis(self._rows(name))) for name in layers
            ],
            "outlier.pearson_kurtosis_layer": [_mean(self._pearson(name)) for name in layers],
            "outlier.massive": [
                {"layer": layer, "channel": channel, "token": token} | row
                for (layer, channel, token), row in sorted(self._massive.items())
            ],
            "outlier.largest": [
                {"layer": layer} | row for layer, row in sorted(self._largest.items())
            ],
        }


def _values(metrics: Iterable[Metric]) -> Tensor:
    # A tensor, because the result of Python's max() depends on the position of a NaN.
    return torch.tensor([metric.value for metric in metrics], dtype=torch.float64)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
