"""How much each sublayer changes what it reads: the size of its update, token by token.

Axes: B windows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from oasis_attn.modeling.families import Family


@contextmanager
def observe_updates(
    layers: Sequence[nn.Module], family: Family, callback: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """While open, each sublayer calls `callback(sublayer, ratio_BT)`: ||v|| / ||h||, float64.

    h is the state as the sublayer reads it, before its norm; v what it adds to the stream, after
    the family's own post-norm (any residual multiplier, one factor for all tokens, is left out, and
    so is `branch_norm`, which makes updates alike in size).
    Sublayers 2l and 2l + 1 are attention and MLP of layer l, native or ours.
    """
    state_BT: dict[int, Tensor] = {}

    def listen(sublayer: int, reader: nn.Module, writer: nn.Module) -> list[Any]:
        def before(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            state_BT[sublayer] = _norm(args[0] if args else kwargs["hidden_states"])

        def after(_module: nn.Module, _args: tuple, output: Any) -> None:
            norm_BT = state_BT.pop(sublayer)
            callback(sublayer, _norm(output).view_as(norm_BT) / norm_BT)

        return [
            reader.register_forward_pre_hook(before, with_kwargs=True),
            writer.register_forward_hook(after),
        ]

    handles: list[Any] = []
    try:
        for index, layer in enumerate(layers):

            def part(*names: str | None, layer: nn.Module = layer) -> nn.Module:
                return getattr(layer, next(name for name in names if name))

            writer = part(family.post_attention, "self_attn")
            handles += listen(2 * index, layer, writer)
            reader, writer = part(family.pre_mlp, family.mlp), part(family.post_mlp, family.mlp)
            handles += listen(2 * index + 1, reader, writer)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _norm(x: Any) -> Tensor:
    """Of a hidden state, or of the first in a tuple: [B, T, D] (or [B * T, D]) to [B, T]."""
    x_BTD = x[0] if isinstance(x, tuple) else x
    return torch.linalg.vector_norm(x_BTD, dim=-1, dtype=torch.float64)
