"""How much each sublayer changes the residual stream at each token.

Axes: B windows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from oasis_attn.modeling.decoder_map import LayerMap


@contextmanager
def observe_updates(
    layers: Sequence[LayerMap], callback: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Context in which `callback(router, ratio_BT)` receives the update of each sublayer.

    The ratio is ||v|| / ||h||, float64 [B, T].  h is the hidden state that the sublayer reads,
    before its norm; v is its output after the family's own post-norm.  Residual multipliers are not
    included, because they are the same for all tokens; nor is `branch_norm`, which gives all
    updates a similar size.  `router` is the index of the router whose mix is h (see
    `modeling.depth_cache`): 2l for the attention of layer l and 2l + 1 for its MLP.

    Args:
        layers: the layers of a decoder whose family has a row in `modeling.families`.
        callback: called once per sublayer and forward pass.
    """
    norm_of_state_BT: dict[int, Tensor] = {}

    def observe(router: int, reader: nn.Module, writer: nn.Module) -> Iterator[RemovableHandle]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            norm_of_state_BT[router] = _norm(args[0] if args else kwargs["hidden_states"])

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            norm_BT = norm_of_state_BT.pop(router)
            callback(router, _norm(output).view_as(norm_BT) / norm_BT)

        yield reader.register_forward_pre_hook(before, with_kwargs=True)
        yield writer.register_forward_hook(after)

    handles: list[RemovableHandle] = []
    try:
        for index, layer in enumerate(layers):
            attention, mlp = layer.attention, layer.mlp
            assert attention is not None
            assert mlp is not None
            handles += observe(2 * index, layer.module, (attention.post_norm or attention).module)
            reader, writer = (mlp.pre_norm or mlp).module, (mlp.post_norm or mlp).module
            handles += observe(2 * index + 1, reader, writer)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _norm(x: Any) -> Tensor:
    """Norm of a hidden state, or of the first one in a tuple: [B, T, D] or [B * T, D] to [B, T]."""
    x_BTD = x[0] if isinstance(x, tuple) else x
    return torch.linalg.vector_norm(x_BTD, dim=-1, dtype=torch.float64)
