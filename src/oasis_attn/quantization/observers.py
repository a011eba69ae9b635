"""Observers: choose the range of values that quantization covers.

An observer receives batches of a tensor (a weight is a single batch) and returns one range per
block of its specification, as two tensors with a last axis of size 1.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from oasis_attn.errors import UserError
from oasis_attn.quantization.primitives import compute_qparams, fake_quantize, to_blocks
from oasis_attn.quantization.spec import QuantSpec

Range = tuple[Tensor, Tensor]


class Observer(Protocol):
    """The interface of all observers; error messages call the tensor `name`."""

    def __init__(self, spec: QuantSpec, name: str = "x") -> None: ...

    def update(self, x: Tensor) -> None:
        """Add one batch; an empty batch has no effect.  `UserError` on NaN and infinity."""

    def range(self) -> Range:
        """The lower and the upper end of each block's range; `UserError` if there was no data."""


def finite_range(blocks: Tensor, name: str) -> Range:
    """The minimum and maximum of every block; `UserError` if one of them is not finite."""
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    if not (low.isfinite().all() and high.isfinite().all()):
        raise UserError(f"{name}: holds NaN or infinity; only finite values can be quantized")
    return low, high


class MinMaxObserver:
    """The minimum and maximum over all batches."""

    def __init__(self, spec: QuantSpec, name: str = "x") -> None:
        self.spec, self.name = spec, name
        self._range: Range | None = None

    def update(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        new = self._batch_range(to_blocks(x, self.spec, self.name))
        self._range = new if self._range is None else self._merge(self._range, new)

    def range(self) -> Range:
        if self._range is None:
            raise UserError(f"{self.name}: no value reached it, so it has no range")
        return self._range

    def _batch_range(self, blocks: Tensor) -> Range:
        return finite_range(blocks, self.name)

    def _merge(self, old: Range, new: Range) -> Range:
        return torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])


class RunningMinMaxObserver(MinMaxObserver):
    """The exponential moving averages (momentum 0.9) of the batches' minima and maxima.

    The outlier literature uses this observer (Bondarenko et al. 2023, 2306.12929).
    """

    momentum = 0.9

    def _merge(self, old: Range, new: Range) -> Range:
        weight = 1 - self.momentum
        return old[0].lerp(new[0], weight), old[1].lerp(new[1], weight)


class PercentileObserver(RunningMinMaxObserver):
    """The moving averages of each batch's percentiles 100 - p and p, with p = 99.999.

    Percentiles are interpolated linearly between order statistics, as in numpy.
    """

    percent = 99.999

    def _batch_range(self, blocks: Tensor) -> Range:
        finite_range(blocks, self.name)
        return -self._upper(-blocks), self._upper(blocks)

    def _upper(self, blocks: Tensor) -> Tensor:
        rank = (1 - self.percent / 100) * (blocks.shape[-1] - 1)
        whole = int(rank)
        top = blocks.topk(min(whole + 2, blocks.shape[-1])).values
        return top[..., whole : whole + 1].lerp(top[..., -1:], rank - whole)


class MSEObserver(MinMaxObserver):
    """The range max(min, -t) .. min(max, t) whose threshold t has the least squared error.

    The squared error is summed over all batches for t = max|x| / 2^(k/8), k = 0 .. 64.  Of a long
    batch, only a random sample of entries is stored, and each is weighted by the number of entries
    that it represents.  The largest and smallest entries are always stored, because only they
    contribute to the clipping error.
    """

    sample, extremes, candidates = 8192, 256, 65

    def __init__(self, spec: QuantSpec, name: str = "x") -> None:
        super().__init__(spec, name)
        self._values: list[Tensor] = []
        self._weights: list[Tensor] = []

    def _batch_range(self, blocks: Tensor) -> Range:
        count = blocks.shape[-1]
        if count <= self.sample + 2 * self.extremes:
            self._store(blocks, torch.ones_like(blocks))
        else:
            inner = torch.ones_like(blocks, dtype=torch.bool)
            for largest in (True, False):
                extreme = blocks.topk(self.extremes, largest=largest)
                inner.scatter_(-1, extreme.indices, False)
                self._store(extreme.values, torch.ones_like(extreme.values))
            # The sample is random, because every n-th entry would cover only a few channels.
            generator = torch.Generator().manual_seed(len(self._values))
            drawn = torch.randint(count, (self.sample,), generator=generator).to(blocks.device)
            share = inner.sum(-1, keepdim=True) / inner[..., drawn].sum(-1, keepdim=True).clamp(1)
            self._store(blocks[..., drawn], inner[..., drawn] * share)
        return super()._batch_range(blocks)

    def _store(self, values: Tensor, weights: Tensor) -> None:
        self._values.append(values.clone())
        self._weights.append(weights)

    def range(self) -> Range:
        low, high = super().range()
        values, weights = torch.cat(self._values, -1), torch.cat(self._weights, -1)
        largest = torch.maximum(-low, high)
        best, least = largest, torch.full_like(largest, torch.inf)
        for k in range(self.candidates):
            bound = largest * 2 ** (-k / 8)
            qparams = compute_qparams(low.maximum(-bound), high.minimum(bound), self.spec)
            rounded = fake_quantize(values, qparams, self.spec.element_type)
            error = rounded.sub(values).square_().mul(weights)
            error = error.sum(-1, keepdim=True)
            best = torch.where(error < least, bound, best)
            least = error.minimum(least)
        return low.maximum(-best), high.minimum(best)


OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "running_minmax": RunningMinMaxObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
}
