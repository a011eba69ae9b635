"""What each attention head writes, and heads that are silent.

A head writes its part of the attention output, times the output projection.  It is silent if this
is small compared with the other heads of its layer.  At most 16 evenly spaced tokens of each window
are read.

Axes: B windows in a batch, L layers, T tokens, X = B * T, H heads, d head width, M = H * d,
D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from oasis_attn.measure.hooks import HookPoint, attention_layers
from oasis_attn.measure.sinks import value_images
from oasis_attn.modeling.attention import AttentionCall
from oasis_attn.records import Metric

SILENT = 0.1  # norm of what a silent head writes, over the root mean square of its layer's heads
TOKENS = 16  # at most so many are read of each window


class HeadOutputs:
    """Computes `sink.silent_heads` during one pass over the windows.

    Only layers with softmax attention whose output projection is known are measured.
    """

    def __init__(self, points: list[HookPoint]) -> None:
        self._layers = sum(point.kind == "layer" for point in points)
        self._projections = {
            layer: point.module
            for layer, point in attention_layers(points).items()
            if point.projects_heads
        }
        self._batch = self._heads = 1
        self._squares: dict[int, list[Tensor]] = {layer: [] for layer in self._projections}

    def update(self, call: AttentionCall) -> None:
        """Remember the shape of a call; the output projection of its layer runs next."""
        self._batch, self._heads = call.query_BHTd.shape[:2]

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Context in which the inputs of the output projections are read."""
        with ExitStack() as stack:
            for layer, projection in self._projections.items():
                handle = projection.register_forward_pre_hook(
                    lambda module, inputs, layer=layer: self._read(layer, module, inputs[0])
                )
                stack.callback(handle.remove)
            yield

    def metrics(self) -> list[Metric]:
        """`sink.silent_heads`, the number of silent heads."""
        if not self._projections:
            return []
        windows = len(torch.cat(next(iter(self._squares.values()))))
        broken = any(bool(output_H.isnan().any()) for output_H in self._outputs().values())
        value = math.nan if broken else float(len(self._silent()))
        return [Metric(name="sink.silent_heads", value=value, n=windows)]

    def tables(self) -> dict[str, Any]:
        """`sink.silent_heads`, the layer and the index of each; and `head.output` [L][H], the norm
        of what a head writes, root mean square over tokens; empty for layers without heads."""
        if not self._projections:
            return {}
        outputs = self._outputs()
        rows = [
            outputs[layer].tolist() if layer in outputs else [] for layer in range(self._layers)
        ]
        return {"sink.silent_heads": self._silent(), "head.output": rows}

    def _silent(self) -> list[list[int]]:
        return [
            [layer, head]
            for layer, output_H in self._outputs().items()
            for head in (output_H <= SILENT * output_H.square().mean().sqrt())
            .nonzero()
            .flatten()
            .tolist()
        ]

    def _outputs(self) -> dict[int, Tensor]:
        """The norm of what each head writes, [H], by layer."""
        return {
            layer: torch.cat(squares).mean(0).sqrt() for layer, squares in self._squares.items()
        }

    def _read(self, layer: int, projection: nn.Module, x: Tensor) -> None:
        x_BTM = x.detach().reshape(self._batch, -1, x.shape[-1])
        step = -(-x_BTM.shape[1] // TOKENS)
        x_BTHd = x_BTM[:, step - 1 :: step].unflatten(-1, (self._heads, -1))
        squares_XH = value_images(x_BTHd.flatten(0, 1), projection).square().sum(-1)
        self._squares[layer].append(squares_XH.unflatten(0, (self._batch, -1)).mean(1).cpu())
