"""Fake quantization of a tensor over its own range, and modules that quantize activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from oasis_attn.errors import UserError, check_choice
from oasis_attn.quantization.casts import FixedPrecisionModule
from oasis_attn.quantization.observers import OBSERVERS, Observer, Range
from oasis_attn.quantization.primitives import QParams, compute_qparams, fake_quantize, to_blocks
from oasis_attn.quantization.spec import QuantSpec


def fake_quantize_dynamic(
    x: Tensor,
    spec: QuantSpec,
    *,
    observer: str = "minmax",
    name: str = "x",
    clip_ratio: float = 1.0,
) -> Tensor:
    """Quantize `x` over its own range and return it in its own shape and dtype.

    Args:
        x: floating point, of any shape that `spec` can divide into blocks.
        spec: the format.
        observer: a name in `OBSERVERS`; it chooses the range of each block.
        name: error messages call `x` by this name.
        clip_ratio: a factor of the range of each block.

    Raises:
        UserError: `x` is not finite, the group size does not divide its width, or the observer is
            unknown.
    """
    if x.numel() == 0:
        return x
    qparams = observe_qparams(x, spec, observer=observer, name=name, clip_ratio=clip_ratio)
    return fake_quantize(to_blocks(x, spec, name), qparams, spec.element_type).reshape(x.shape)


def observe_qparams(
    x: Tensor,
    spec: QuantSpec,
    *,
    observer: str = "minmax",
    name: str = "x",
    clip_ratio: float = 1.0,
) -> QParams:
    """The parameters that `fake_quantize_dynamic` uses for `x`, which must not be empty."""
    check_choice("observer", observer, OBSERVERS)
    chosen = OBSERVERS[observer](spec, name)
    chosen.update(x.detach())
    low, high = chosen.range()
    return compute_qparams(low * clip_ratio, high * clip_ratio, spec)


class DynamicQuantizer(nn.Module):
    """Quantizes each input over `clip_ratio` times its own min-max range."""

    def __init__(self, spec: QuantSpec, *, name: str = "x", clip_ratio: float = 1.0) -> None:
        super().__init__()
        self.spec, self.name, self.clip_ratio = spec, name, clip_ratio

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize_dynamic(x, self.spec, name=self.name, clip_ratio=self.clip_ratio)

    def extra_repr(self) -> str:
        return repr(self.spec)


class StaticQuantizer(FixedPrecisionModule):
    """Quantizes every input over one range, which calibration fixes in advance.

    Inside `calibrating`, inputs pass unchanged and the observer records them; afterwards the range
    is fixed.  Before that, the buffers `scale`, `quant_min` and `quant_max` ([1], see `QParams`)
    are NaN.  Casts of the module do not change the dtype of these buffers.  While `enabled` is
    false, inputs pass unchanged.

    In a format whose blocks have `e4m3` scales, only the range of the whole tensor is fixed; the
    scales of blocks relative to it are computed from each input.
    """

    fixed_buffers = QParams._fields
    scale: Tensor
    quant_min: Tensor
    quant_max: Tensor

    def __init__(self, spec: QuantSpec, *, observer: str = "minmax", name: str = "x") -> None:
        super().__init__()
        if not spec.has_static_scale:
            raise UserError(
                f"granularity: {spec.granularity!r} has no static range; it must be 'tensor'"
            )
        check_choice("observer", observer, OBSERVERS)
        self.spec, self.name, self.observer = spec, name, observer
        self._active_observer: Observer | SharedObserver | None = None
        self.enabled = True
        for field in QParams._fields:
            self.register_buffer(field, torch.full((1,), torch.nan, dtype=torch.float32))

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Fix the range to that of all inputs inside the context; `UserError` without inputs."""
        spec = self.spec.per_tensor()
        self._active_observer = OBSERVERS[self.observer](spec, self.name)
        try:
            yield
            qparams = compute_qparams(*self._active_observer.range(), spec)
        finally:
            self._active_observer = None
        self._set_qparams(qparams)

    def _set_qparams(self, qparams: QParams) -> None:
        for field, value in qparams._asdict().items():
            setattr(self, field, value.clone())

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest value that a quantized input can have."""
        return float(self.scale * self.quant_min), float(self.scale * self.quant_max)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        if self._active_observer is not None:
            self._active_observer.update(x.detach())
            return x
        blocks, qparams = x, QParams(self.scale, self.quant_min, self.quant_max)
        if self.spec.granularity == "group":
            blocks = to_blocks(x, self.spec, self.name)
            largest = blocks.detach().abs().amax(-1, keepdim=True)
            qparams = compute_qparams(-largest, largest, self.spec, tensor_scale=self.scale)
        return fake_quantize(blocks, qparams, self.spec.element_type).view_as(x)

    def extra_repr(self) -> str:
        return f"{self.spec}, observer={self.observer!r}"


class SharedObserver:
    """One observer for several quantizers: all inputs between two flushes form one batch."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._inputs: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self._inputs.append(x.flatten())

    def flush(self, *_hook_arguments: Any) -> None:
        """End the batch.  This method can be registered as a forward hook."""
        if self._inputs:
            self._observer.update(torch.cat(self._inputs))
            self._inputs.clear()

    def range(self) -> Range:
        return self._observer.range()


@contextmanager
def calibrating_together(
    quantizers: Sequence[StaticQuantizer], name: str
) -> Iterator[SharedObserver]:
    """As `StaticQuantizer.calibrating`, but with one range for all of `quantizers`.

    All of them must have the same specification and observer.
    """
    first, spec = quantizers[0], quantizers[0].spec.per_tensor()
    shared = SharedObserver(OBSERVERS[first.observer](spec, name))
    for quantizer in quantizers:
        quantizer._active_observer = shared
    try:
        yield shared
        qparams = compute_qparams(*shared.range(), spec)
    finally:
        for quantizer in quantizers:
            quantizer._active_observer = None
    for quantizer in quantizers:
        quantizer._set_qparams(qparams)
