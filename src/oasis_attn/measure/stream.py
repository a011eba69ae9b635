"""One observed pass of a model over windows of tokens.  Axes: N windows, B in a batch, T tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.hub.model_info import eval_mode
from oasis_attn.measure.hooks import HookPoint, check_output, check_runs
from oasis_attn.measure.loss import window_losses
from oasis_attn.modeling.attention import AttentionCall, observe_attention
from oasis_attn.modeling.depth_cache import RouterCall, observe_depth
from oasis_attn.modeling.native_depth import observe_native_depth


def stream(
    model: PreTrainedModel,
    points: Sequence[HookPoint],
    batches: Iterable[Tensor],
    *,
    attention: Callable[[AttentionCall], None],
    output: Callable[[HookPoint, Tensor, Tensor], None],
    depth: Callable[[RouterCall], None],
    after: Callable[[Tensor], None],
) -> Tensor:
    """Run `model` in eval mode without gradients, and pass on what happens in it.

    Args:
        points: the modules whose outputs are observed.
        batches: token ids, [B, T] each.
        attention: receives each attention call.
        output: receives each hook point, its output [B, T, D] and the token ids.
        depth: receives each router call.
        after: receives the token ids after each forward pass.

    Returns:
        The mean loss of each window [N], in nats per token.

    Raises:
        UserError: a hook point did not run exactly once in a forward pass, or its output is not one
            vector per token.
    """
    runs: Counter[str] = Counter()
    final: dict[str, tuple[HookPoint, Tensor]] = {}

    def see(point: HookPoint, x: Any) -> None:
        runs[point.name] += 1
        x_BTD = check_output(model, point, x[0] if isinstance(x, tuple | list) else x, ids_BT)
        if point.kind == "final_norm":  # some families also use it before the first layer
            final[point.name] = point, x_BTD
        else:
            output(point, x_BTD, ids_BT)

    losses_N = []
    with eval_mode(model), torch.no_grad(), ExitStack() as stack:
        stack.enter_context(observe_attention(model, attention))
        stack.enter_context(observe_depth(model, depth))
        stack.enter_context(observe_native_depth(model, depth))
        for point in points:
            stack.enter_context(_hooked(point, see))
        for ids_BT in batches:
            runs.clear()
            losses_N.append(window_losses(model, ids_BT))
            for point in points:
                check_runs(model, point, runs[point.name])
            for point, x_BTD in final.values():
                output(point, x_BTD, ids_BT)
            after(ids_BT)
    return torch.cat(losses_N)


@contextmanager
def _hooked(point: HookPoint, see: Callable[[HookPoint, Any], None]) -> Iterator[None]:
    handle = point.module.register_forward_hook(lambda _module, _inputs, output: see(point, output))
    try:
        yield
    finally:
        handle.remove()
