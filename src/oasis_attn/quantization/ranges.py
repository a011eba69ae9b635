"""Range estimators: over which interval of a tensor's values a grid is put.

An estimator sees a stream of batches (a weight is a stream of one) and names one range per block of
its grid, as two tensors whose last axis is 1.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from oasis_attn.errors import UserError
from oasis_attn.quantization.grids import Grid, place, snap, to_blocks

Range = tuple[Tensor, Tensor]


class Estimator(Protocol):
    """What all estimators do; `site` is how their error messages call the tensor."""

    def __init__(self, grid: Grid, site: str = "x") -> None: ...

    def update(self, x: Tensor) -> None:
        """Take in one batch; an empty one says nothing.  `UserError` on NaN and infinity."""

    def range(self) -> Range:
        """The least and greatest value per block; `UserError` if nothing was seen."""


def finite_range(blocks: Tensor, site: str) -> Range:
    """Least and greatest entry of every block; `UserError` naming `site` if one is not finite."""
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    if not (low.isfinite().all() and high.isfinite().all()):
        raise UserError(f"{site}: holds NaN or infinity; only finite values can be quantised")
    return low, high


class MinMax:
    """The least and the greatest value ever seen."""

    def __init__(self, grid: Grid, site: str = "x") -> None:
        self.grid, self.site = grid, site
        self._seen: Range | None = None

    def update(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        new = self._of_batch(to_blocks(x, self.grid, self.site))
        self._seen = new if self._seen is None else self._merge(self._seen, new)

    def range(self) -> Range:
        if self._seen is None:
            raise UserError(f"{self.site}: no value reached it, so it has no range")
        return self._seen

    def _of_batch(self, blocks: Tensor) -> Range:
        return finite_range(blocks, self.site)

    def _merge(self, old: Range, new: Range) -> Range:
        return torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])


class RunningMinMax(MinMax):
    """Exponential mean over batches of their least and greatest values, momentum 0.9.

    The estimator of the outlier literature (Bondarenko et al. 2023, 2306.12929).
    """

    momentum = 0.9

    def _merge(self, old: Range, new: Range) -> Range:
        weight = 1 - self.momentum
        return old[0].lerp(new[0], weight), old[1].lerp(new[1], weight)


class Percentile(RunningMinMax):
    """As `RunningMinMax`, of each batch's 100 - p and p percentiles, p = 99.999.

    Between two order statistics the percentile is interpolated linearly, as numpy does.
    """

    percent = 99.999

    def _of_batch(self, blocks: Tensor) -> Range:
        finite_range(blocks, self.site)
        return -self._upper(-blocks), self._upper(blocks)

    def _upper(self, blocks: Tensor) -> Tensor:
        rank = (1 - self.percent / 100) * (blocks.shape[-1] - 1)
        whole = int(rank)
        top = blocks.topk(min(whole + 2, blocks.shape[-1])).values
        return top[..., whole : whole + 1].lerp(top[..., -1:], rank - whole)


class LeastSquares(MinMax):
    """The clipping threshold t that moves the data least: low, high = max(min, -t), min(max, t).

    The squared error is summed over all batches for t = max|x| / 2^(k/8), k = 0 .. 64.  Of a long
    batch only some entries, drawn at random, are kept, each weighted by the number it stands for,
    and the extremes in full, because the error of clipping is theirs alone.
    """

    sample, extremes, candidates = 8192, 256, 65

    def __init__(self, grid: Grid, site: str = "x") -> None:
        super().__init__(grid, site)
        self._values: list[Tensor] = []
        self._weights: list[Tensor] = []

    def _of_batch(self, blocks: Tensor) -> Range:
        count = blocks.shape[-1]
        if count <= self.sample + 2 * self.extremes:
            self._keep(blocks, torch.ones_like(blocks))
        else:
            inner = torch.ones_like(blocks, dtype=torch.bool)
            for largest in (True, False):
                extreme = blocks.topk(self.extremes, largest=largest)
                inner.scatter_(-1, extreme.indices, False)
                self._keep(extreme.values, torch.ones_like(extreme.values))
            # At random: steps of one length would meet few of the channels.
            generator = torch.Generator().manual_seed(len(self._values))
            drawn = torch.randint(count, (self.sample,), generator=generator).to(blocks.device)
            share = inner.sum(-1, keepdim=True) / inner[..., drawn].sum(-1, keepdim=True).clamp(1)
            self._keep(blocks[..., drawn], inner[..., drawn] * share)
        return super()._of_batch(blocks)

    def _keep(self, values: Tensor, weights: Tensor) -> None:
        self._values.append(values.clone())
        self._weights.append(weights)

    def range(self) -> Range:
        low, high = super().range()
        values, weights = torch.cat(self._values, -1), torch.cat(self._weights, -1)
        largest = torch.maximum(-low, high)
        best, least = largest, torch.full_like(largest, torch.inf)
        for k in range(self.candidates):
            bound = largest * 2 ** (-k / 8)
            levels = place(low.maximum(-bound), high.minimum(bound), self.grid)
            error = ((snap(values, levels) - values).square_() * weights).sum(-1, keepdim=True)
            best = torch.where(error < least, bound, best)
            least = error.minimum(least)
        return low.maximum(-best), high.minimum(best)


ESTIMATORS: dict[str, type[Estimator]] = {
    "minmax": MinMax,
    "running_minmax": RunningMinMax,
    "percentile": Percentile,
    "mse": LeastSquares,
}
