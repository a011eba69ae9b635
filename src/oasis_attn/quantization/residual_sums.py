"""Where a decoder of a family without a row adds to its residual stream, found by running it.

Each layer adds the outputs y of its sublayers (softmax attention, linear attention or state space,
MLP) to its input x, in one of these forms, with numbers a, b and c:

- one after the other: r = a x + b y1, and the layer returns a' r + c y2;
- in parallel, or with one sublayer only: the layer returns a x + b y1 + c y2.

A pass over a few tokens shows which form it is, and changes r in place on the way: the output shows
whether the layer carries on what the second sublayer reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.hub.model_info import eval_mode
from oasis_attn.modeling.decoder_map import DecoderMap, LayerMap
from oasis_attn.quantization.calibration import run_batch

_TOKENS = 8
_UNEXPLAINED = 0.1  # of what a layer adds to the median token


@torch.no_grad()
def find_sums(model: PreTrainedModel, decoder: DecoderMap) -> list[str] | None:
    """For each layer, the module that reads the sum r; empty if a layer has no such sum.

    None if a layer computes something else than the forms above.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(_TOKENS)[None] % vocabulary
    with eval_mode(model), ExitStack() as stack:
        passes = [_Pass(layer, stack) for layer in decoder.layers]
        run_batch(model.base_model, ids)
    found = [each.reader_of_sum() for each in passes]
    return None if None in found else [name for name in found if name is not None]


class _Pass:
    """What one layer computes in a forward pass."""

    def __init__(self, layer: LayerMap, stack: ExitStack) -> None:
        mlp = layer.mlp
        self._first = [part.module for part in (layer.attention, layer.mixer) if part]
        self._second = [mlp.module] if mlp else []
        self._reader = (mlp.pre_norm or mlp) if mlp and self._first else None
        self._norms = [part.module for part in layer.norms]
        self._layer = layer.module
        self._inputs: dict[nn.Module, list[Tensor]] = {}
        self._outputs: dict[nn.Module, list[Tensor]] = {}
        self._sums: list[Tensor] = []
        if self._reader:
            stack.callback(self._reader.module.register_forward_pre_hook(self._on_sum).remove)
        for module in dict.fromkeys([self._layer, *self._first, *self._second, *self._norms]):
            for handle in (
                module.register_forward_pre_hook(self._on_input),
                module.register_forward_hook(self._on_output),
            ):
                stack.callback(handle.remove)

    # Copies, because layers may overwrite what they have read.

    def _on_sum(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and self._layer in self._inputs:
            self._sums.append(args[0].clone())
            if not _equal(args[0], self._inputs[self._layer][0]):
                args[0][..., ::2] *= 1.5

    def _on_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            self._inputs.setdefault(module, []).append(args[0].clone())

    def _on_output(self, module: nn.Module, _args: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        self._outputs.setdefault(module, []).append(first.clone())

    def reader_of_sum(self) -> str | None:
        """The module that reads the sum r, empty if there is none; None in an unknown form."""
        parts = [self._outputs.get(module, []) for module in (*self._first, *self._second)]
        x, y = self._inputs.get(self._layer, []), self._outputs.get(self._layer, [])
        if any(len(each) != 1 for each in (x, y, *parts)) or len(self._sums) != bool(self._reader):
            return None
        added = [self._after_norm(each[0]) for each in parts]
        if not self._reader or _equal(self._sums[0], x[0]):
            return "" if _is_sum(y[0], x[0], added) else None
        changed = self._inputs[self._reader.module][0]
        count = len(self._first)
        known = _is_sum(self._sums[0], x[0], added[:count]) and _is_sum(
            y[0], changed, added[count:]
        )
        return self._reader.name if known else None

    def _after_norm(self, x: Tensor) -> Tensor:
        """What a norm of the layer makes of `x`; `x` itself if no norm reads it."""
        for norm in self._norms:
            pairs = zip(self._inputs.get(norm, ()), self._outputs.get(norm, ()), strict=True)
            for given, returned in pairs:
                if _equal(given, x):
                    return returned
        return x


def _equal(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have the same entries, in any shape."""
    return torch.equal(x.flatten(), y.flatten())


def _is_sum(total: Tensor, x: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether `total` is a sum of `x` and the parts, each times a number, up to rounding."""
    if any(each.numel() != x.numel() for each in (total, *parts)):
        return False
    eps = torch.finfo(x.dtype).eps
    total, x, *parts = (
        each.detach().double().cpu().view(_TOKENS, -1) for each in (total, x, *parts)
    )
    columns = torch.stack([each.flatten() for each in (x, *parts)], 1)
    numbers = torch.linalg.lstsq(columns, total.flatten()[:, None], driver="gelsd").solution
    added = (columns[:, 1:] @ numbers[1:]).view_as(x).norm(dim=1)
    error = (total - (columns @ numbers).view_as(x)).norm(dim=1)
    rounding = 4 * eps * (total.norm(dim=1) + x.norm(dim=1) + added)
    # Of 16-bit numbers, the rounding of x may be larger than what is added to a massive activation.
    return bool((error <= rounding).all() and (error / added).nanmedian() < _UNEXPLAINED)
