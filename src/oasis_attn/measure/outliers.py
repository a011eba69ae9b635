"""Activation outliers: inf-norm, kurtosis and massive activations of every hooked tensor.

Axes: B sequences, T tokens, D width; M = T * D.  Each tensor is reduced in the hook that sees it,
by pieces small enough for the cache; none is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from oasis_attn.measure.parts import Tap
from oasis_attn.measure.statistics import mean_metric
from oasis_attn.records import Metric

MASSIVE = 100.0  # Sun et al. 2024 (arXiv 2402.17762), section 2: above this ...
MASSIVE_RATIO = 1000.0  # ... and above this many medians of |x| in the same hidden state
LITERATURE_EPSILON = 1e-6  # in the denominator of the literature's kurtosis
SILENT = 1e-3  # a tensor whose standard deviation is at most this share of the median tensor's
CONSTANT = 1e-12  # a standard deviation of at most this share of the root mean square is rounding
_PIECE = 1 << 18


def inf_norm(x_BM: Tensor) -> Tensor:
    """max |x| of each row, [B]; NaN where the row holds one."""
    return torch.maximum(x_BM.amax(-1), -x_BM.amin(-1))


@dataclass(frozen=True)
class Moments:
    """Mean and central moments of each row of x / scale, all [B] float64.

    Attributes:
        count: values in a row.
        mean, second, fourth: of x / scale; `second` is the biased variance.
        scale: 1, or for float64 the power of two next to the row's largest value, so that fourth
            powers neither overflow nor vanish.  Narrower types fit in float64 as they are.
    """

    count: int
    mean: Tensor
    second: Tensor
    fourth: Tensor
    scale: Tensor

    @property
    def standard_deviation(self) -> Tensor:
        """Of x, biased."""
        return self.second.sqrt() * self.scale

    @property
    def constant(self) -> Tensor:
        """Whether a row is one value over and over, up to rounding in float64."""
        return self.second.sqrt() <= CONSTANT * (self.mean.square() + self.second).sqrt()


def moments(x_BM: Tensor) -> Moments:
    """The moments of each row, summed in float64; centred first, so that they do not cancel."""
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

    The form of Bondarenko et al. 2023 (arXiv 2306.12929), OutEffHop and OASIS, to the letter.  The
    1e-6 does not scale with x: where s^4 is not far above it, the value is too low.
    """
    variance_B = row.second * (row.count / (row.count - 1))
    return row.fourth / (variance_B.square() + LITERATURE_EPSILON / row.scale**4)


def pearson_kurtosis(row: Moments) -> Tensor:
    """mean((x - mu)^4) / mean((x - mu)^2)^2 of each row, [B] float64; NaN where it is constant.

    Of every scale the same, at least 1, and 3 for a normal variable.
    """
    kurtosis_B = (row.fourth / row.second.square()).clamp_min(1)
    return kurtosis_B.masked_fill(row.constant, torch.nan)


class Outliers:
    """The outlier.* measures of one pass over windows."""

    def __init__(self, taps: list[Tap]) -> None:
        self._taps = taps
        self._inf_norms: dict[str, list[Tensor]] = {tap.name: [] for tap in taps}
        self._moments: dict[str, list[Moments]] = {tap.name: [] for tap in taps}
        self._non_finite = dict.fromkeys(self._inf_norms, 0)
        self._massive: dict[tuple[int, int, int], dict[str, Any]] = {}

    def see(self, tap: Tap, x: Tensor, ids_BT: Tensor) -> None:
        """Take in one output, [B, T, D] or, as in some MLPs, [B * T, D]."""
        x_BM = x.detach().reshape(len(ids_BT), -1)
        peaks_B = inf_norm(x_BM)
        self._inf_norms[tap.name].append(peaks_B)
        self._moments[tap.name].append(moments(x_BM))
        for sequence, peak in enumerate(peaks_B.tolist()):
            if not abs(peak) < float("inf"):
                broken = x_BM[sequence].isfinite().logical_not().sum()
                self._non_finite[tap.name] += int(broken)
            elif tap.kind == "layer" and peak > MASSIVE:
                self._note_massive(tap, x_BM[sequence].view(ids_BT.shape[1], -1), ids_BT[sequence])

    def _note_massive(self, tap: Tap, x_TD: Tensor, ids_T: Tensor) -> None:
        assert tap.layer is not None
        sizes_TD = x_TD.abs()
        massive = sizes_TD > max(MASSIVE, MASSIVE_RATIO * float(sizes_TD.median()))
        for position, channel in massive.nonzero().tolist():
            key = (tap.layer, channel, int(ids_T[position]))
            value = float(x_TD[position, channel])
            row = self._massive.setdefault(
                key, {"count": 0, "largest": value, "first_position": position}
            )
            row["count"] += 1
            row["largest"] = max(row["largest"], value, key=abs)
            row["first_position"] = min(row["first_position"], position)

    def _rows(self, name: str) -> Moments:
        """The moments of one tensor in all sequences, N for B."""
        batches = self._moments[name]

        def joined(part: str) -> Tensor:
            return torch.cat([getattr(batch, part) for batch in batches])

        return Moments(batches[0].count, *map(joined, ("mean", "second", "fourth", "scale")))

    def _pearson(self, name: str) -> Tensor:
        """The scale-free kurtosis of one tensor in those sequences in which it is not constant."""
        rows = self._rows(name)
        return pearson_kurtosis(rows)[~rows.constant]

    def _quiet(self) -> tuple[list[str], list[str]]:
        """The tensors that are silent, and those whose literature kurtosis is understated.

        The size of a tensor is the mean of its standard deviations over sequences.
        """
        rows = {tap.name: self._rows(tap.name) for tap in self._taps}
        sizes = torch.stack([r.standard_deviation.mean() for r in rows.values()])
        constant = torch.stack([r.constant.all() for r in rows.values()])
        silent = constant | (sizes <= SILENT * sizes.nanmedian())
        understated = sizes**4 <= LITERATURE_EPSILON
        return list(compress(rows, silent.tolist())), list(compress(rows, understated.tolist()))

    def metrics(self) -> list[Metric]:
        """Per tensor, means over sequences; then over tensors: maxima, and mean kurtoses.

        Tensors that are silent have no part in the mean and maximum of the scale-free kurtosis.
        """
        inf_norms = {
            tap: mean_metric("outlier.max_inf_norm", torch.cat(self._inf_norms[tap.name]), tap.name)
            for tap in self._taps
        }
        literature = [
            mean_metric("outlier.kurtosis", literature_kurtosis(self._rows(tap.name)), tap.name)
            for tap in self._taps
        ]
        pearson = [
            mean_metric("outlier.pearson_kurtosis", kurtosis_N, tap.name)
            for tap in self._taps
            if len(kurtosis_N := self._pearson(tap.name))
        ]
        silent, understated = self._quiet()
        n = literature[0].n

        def one(name: str, value: Tensor | float, where: str = "") -> Metric:
            return Metric(name=name, value=float(value), where=where, n=n)

        def largest(kind: str = "") -> Tensor:
            return _values(m for tap, m in inf_norms.items() if kind in ("", tap.kind)).max()

        def counted(name: str, counts: dict[str, int]) -> list[Metric]:
            """The sum, and the places where it is not 0."""
            places = [one(name, count, place) for place, count in counts.items() if count]
            return [one(name, sum(counts.values())), *places]

        active = _values(m for m in pearson if m.where not in silent)
        return [
            one("outlier.max_inf_norm", largest()),
            one("outlier.max_inf_norm_mlp", largest("mlp")),
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
        """Per decoder layer's output: inf-norm [L] and kurtosis [L], the literature's and the
        scale-free one (NaN where the output is constant); and the massive activations, one row per
        layer, channel and token."""
        layers = [tap.name for tap in self._taps if tap.kind == "layer"]
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
        }


def _values(metrics: Iterable[Metric]) -> Tensor:
    # A tensor, because Python's max() forgets a NaN or not depending on where it stands.
    return torch.tensor([metric.value for metric in metrics], dtype=torch.float64)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
