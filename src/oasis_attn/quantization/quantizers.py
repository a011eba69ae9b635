"""Quantisation over a tensor's own range, and quantisers as modules: dynamic and static."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from oasis_attn.errors import UserError, check_choice
from oasis_attn.quantization.casts import KeepsPrecision
from oasis_attn.quantization.grids import Grid, Levels, place, snap, to_blocks
from oasis_attn.quantization.ranges import ESTIMATORS, Estimator, Range


def fake_quantize(x: Tensor, grid: Grid, *, estimator: str = "minmax", site: str = "x") -> Tensor:
    """Quantise `x` over its own range and return it in its own shape and dtype.

    Args:
        x: floating point, finite (`UserError` otherwise), of any shape that `grid` can block.
        grid: levels and blocks.
        estimator: a name in `ESTIMATORS`; how the range of each block is chosen.
        site: how error messages call `x`.
    """
    if x.numel() == 0:
        return x
    levels = find_levels(x, grid, estimator=estimator, site=site)
    return snap(to_blocks(x, grid, site), levels).reshape(x.shape)


def find_levels(x: Tensor, grid: Grid, *, estimator: str = "minmax", site: str = "x") -> Levels:
    """Where `fake_quantize` puts the grid: one entry per block of `x`, which is not empty."""
    check_choice("estimator", estimator, ESTIMATORS)
    chosen = ESTIMATORS[estimator](grid, site)
    chosen.update(x.detach())
    return place(*chosen.range(), grid)


class DynamicQuantizer(nn.Module):
    """Quantises each input over that input's own min-max range."""

    def __init__(self, grid: Grid, *, site: str = "x") -> None:
        super().__init__()
        self.grid, self.site = grid, site

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.grid, site=self.site)

    def extra_repr(self) -> str:
        return repr(self.grid)


class StaticQuantizer(KeepsPrecision):
    """Quantises every input over one range, fixed beforehand on calibration data.

    Inside `observing` inputs pass unchanged and feed the estimator; afterwards the range is fixed.
    The buffers `scale`, `lowest` and `highest` ([1], see `Levels`) are NaN until then, and no cast
    of the module rounds them.  While `enabled` is false, inputs pass unchanged.
    """

    kept = Levels._fields
    scale: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, grid: Grid, *, estimator: str = "minmax", site: str = "x") -> None:
        super().__init__()
        if grid.granularity != "tensor":
            raise UserError(
                f"granularity: {grid.granularity!r} has no static range; it must be 'tensor'"
            )
        check_choice("estimator", estimator, ESTIMATORS)
        self.grid, self.site, self.estimator = grid, site, estimator
        self._observer: Estimator | Pool | None = None
        self.enabled = True
        for name in Levels._fields:
            self.register_buffer(name, torch.full((1,), torch.nan, dtype=torch.float32))

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Collect the range of all inputs seen inside; `UserError` if there were none."""
        self._observer = ESTIMATORS[self.estimator](self.grid, self.site)
        try:
            yield
            levels = place(*self._observer.range(), self.grid)
        finally:
            self._observer = None
        self._fix(levels)

    def _fix(self, levels: Levels) -> None:
        for name, value in levels._asdict().items():
            setattr(self, name, value.clone())

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest value that inputs can take."""
        return float(self.scale * self.lowest), float(self.scale * self.highest)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        if self._observer is None:
            return snap(x, Levels(self.scale, self.lowest, self.highest))
        self._observer.update(x.detach())
        return x

    def extra_repr(self) -> str:
        return f"{self.grid}, estimator={self.estimator!r}"


class Pool:
    """An estimator for several quantisers: one batch is all that they see between two flushes."""

    def __init__(self, estimator: Estimator) -> None:
        self._estimator = estimator
        self._seen: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self._seen.append(x.flatten())

    def flush(self, *_hook_arguments: Any) -> None:
        """End the batch; fit to be a forward hook."""
        if self._seen:
            self._estimator.update(torch.cat(self._seen))
            self._seen.clear()

    def range(self) -> Range:
        return self._estimator.range()


@contextmanager
def observing_together(quantizers: Sequence[StaticQuantizer], site: str) -> Iterator[Pool]:
    """As `StaticQuantizer.observing`, with one range for all of `quantizers`, which are alike."""
    first = quantizers[0]
    pool = Pool(ESTIMATORS[first.estimator](first.grid, site))
    for quantizer in quantizers:
        quantizer._observer = pool
    try:
        yield pool
        levels = place(*pool.range(), first.grid)
    finally:
        for quantizer in quantizers:
            quantizer._observer = None
    for quantizer in quantizers:
        quantizer._fix(levels)
