"""Activation outliers: inf-norm, kurtosis and massive activations of every hooked tensor.

Axes: B sequences, T tokens, D width; M = T * D.  Each tensor is reduced in the hook that sees it,
by pieces small enough for the cache; none is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oasis_attn.measure.parts import Tap
from oasis_attn.measure.statistics import mean_metric
from oasis_attn.records import Metric

MASSIVE = 100.0  # Sun et al. 2024 (arXiv 2402.17762), section 2: above this ...
MASSIVE_RATIO = 1000.0  # ... and above this many medians of |x| in the same hidden state
_PIECE = 1 << 18


def inf_norm(x_BM: Tensor) -> Tensor:
    """max |x| of each row, [B]; NaN where the row holds one."""
    return torch.maximum(x_BM.amax(-1), -x_BM.amin(-1))


def kurtosis(x_BM: Tensor) -> Tensor:
    """mean((x - mu)^4) / (s^4 + 1e-6) of each row, [B] float64; 3 for a normal variable.

    s is the unbiased standard deviation.  This is the form of Bondarenko et al. 2023
    (arXiv 2306.12929), OutEffHop and OASIS.  The moments are centred and summed in float64.
    """
    return torch.stack([_kurtosis(x_M) for x_M in x_BM])


def _kurtosis(x_M: Tensor) -> Tensor:
    pieces = x_M.split(_PIECE)
    n = x_M.numel()
    mean = sum(piece.double().sum() for piece in pieces) / n
    second = fourth = torch.zeros((), dtype=torch.float64, device=x_M.device)
    for piece in pieces:
        squares = (piece.double() - mean).square_()
        second = second + squares.sum()
        fourth = fourth + squares.dot(squares)
    variance = second / (n - 1)
    return (fourth / n) / (variance.square() + 1e-6)


class Outliers:
    """The outlier.* measures of one pass over windows."""

    def __init__(self, taps: list[Tap]) -> None:
        self._taps = taps
        self._inf_norms: dict[str, list[Tensor]] = {tap.name: [] for tap in taps}
        self._kurtoses: dict[str, list[Tensor]] = {tap.name: [] for tap in taps}
        self._non_finite = dict.fromkeys(self._inf_norms, 0)
        self._massive: dict[tuple[int, int, int], dict[str, Any]] = {}

    def see(self, tap: Tap, x: Tensor, ids_BT: Tensor) -> None:
        """Take in one output, [B, T, D] or, as in some MLPs, [B * T, D]."""
        x_BM = x.detach().reshape(len(ids_BT), -1)
        peaks_B = inf_norm(x_BM)
        self._inf_norms[tap.name].append(peaks_B)
        self._kurtoses[tap.name].append(kurtosis(x_BM))
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

    def metrics(self) -> list[Metric]:
        """Per tensor, means over sequences; then over tensors: maxima, and the mean kurtosis."""
        inf_norms = {
            tap: mean_metric("outlier.max_inf_norm", torch.cat(self._inf_norms[tap.name]), tap.name)
            for tap in self._taps
        }
        kurtoses = [
            mean_metric("outlier.kurtosis", torch.cat(self._kurtoses[tap.name]), tap.name)
            for tap in self._taps
        ]
        n = kurtoses[0].n

        def whole(name: str, value: Tensor) -> Metric:
            return Metric(name=name, value=float(value), n=n)

        def largest(kind: str = "") -> Tensor:
            return _values(m for tap, m in inf_norms.items() if kind in ("", tap.kind)).max()

        return [
            whole("outlier.max_inf_norm", largest()),
            whole("outlier.max_inf_norm_mlp", largest("mlp")),
            whole("outlier.max_inf_norm_layer", largest("layer")),
            whole("outlier.avg_kurtosis", _values(kurtoses).mean()),
            whole("outlier.max_kurtosis", _values(kurtoses).max()),
            whole("outlier.massive", torch.tensor(sum(r["count"] for r in self._massive.values()))),
            whole("outlier.non_finite", torch.tensor(sum(self._non_finite.values()))),
            *inf_norms.values(),
            *kurtoses,
            *(
                Metric(name="outlier.non_finite", value=count, where=name, n=n)
                for name, count in self._non_finite.items()
                if count
            ),
        ]

    def tables(self) -> dict[str, Any]:
        """Per decoder layer's output: inf-norm [L] and kurtosis [L]; and the massive activations,
        one row per layer, channel and token."""
        layers = [tap.name for tap in self._taps if tap.kind == "layer"]
        return {
            "outlier.inf_norm_layer": _means(self._inf_norms[name] for name in layers),
            "outlier.kurtosis_layer": _means(self._kurtoses[name] for name in layers),
            "outlier.massive": [
                {"layer": layer, "channel": channel, "token": token} | row
                for (layer, channel, token), row in sorted(self._massive.items())
            ],
        }


def _values(metrics: Any) -> Tensor:
    # A tensor, because Python's max() forgets a NaN or not depending on where it stands.
    return torch.tensor([metric.value for metric in metrics], dtype=torch.float64)


def _means(batches: Any) -> list[float]:
    return [float(torch.cat(values).double().mean()) for values in batches]
