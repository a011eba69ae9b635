"""Attention of families with peculiarities: keys that an indexer selects, and no interface.

Axes: B batch, H query heads, T queries, S keys, K selected keys, d head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.attention_call import AttentionCall
from oasis_attn.modeling.decoder_map import AttentionMap

_ROW_SUM = 1e-2  # allowed difference of the sum of a map's row from 1, in any precision


def selected_keys_mask(
    module: Any,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    indices_BTK: Tensor | None,
    block_indices: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """`mask` without the keys that the family's indexer does not select.

    transformers masks them itself, but only for its own attention functions.
    """
    B, T, S = query.shape[0], query.shape[2], key.shape[2]
    if indices_BTK is not None:
        assert mask is not None  # the indexer has read it
        selected_BTS = torch.zeros(B, T, S, dtype=torch.bool, device=query.device)
        selected_B1TS = selected_BTS.scatter_(-1, indices_BTK.long(), True).unsqueeze(1)
        if mask.dtype == torch.bool:
            return mask & selected_B1TS
        return mask.masked_fill(~selected_B1TS, torch.finfo(mask.dtype).min)
    if position_ids is None:
        position_ids = torch.arange(S - T, S, device=query.device)
    position_ids = position_ids.reshape(-1, T).expand(B, T)
    selected: Tensor = module.indexer.build_block_mask(
        block_indices, mask, S, query.dtype, query.device, position_ids
    )
    return selected


@contextmanager
def observed_map(
    model: PreTrainedModel,
    attention: AttentionMap,
    callback: Callable[[AttentionCall], None],
) -> Iterator[None]:
    """Context in which `callback` receives the map that the module returns with its output.

    Without a cache, the first query attends only to the first key, so that the value of this key is
    the context of this query, the input of the output projection.  With a cache it is NaN.

    Raises:
        UserError: by a forward pass, if the module returns no map of causal attention.
    """
    if attention.output is None:
        raise _refusal(model, f"the output projection of {attention.name} was not found")
    contexts: list[Tensor] = []

    def ask(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"output_attentions": True}

    def project(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        contexts[:] = [args[0]]

    def returned(module: nn.Module, _args: Any, output: Any) -> None:
        maps = [x for x in _tensors(output) if x.ndim == 4]
        weights_BHTS = maps[0].float() if maps else None
        if weights_BHTS is None or not _is_causal(weights_BHTS):
            raise _refusal(model, f"{attention.name} returns no map of causal softmax attention")
        first_BD = contexts[0].flatten(2)[:, 0]
        _, heads, T, S = weights_BHTS.shape
        value_BHd = first_BD.unflatten(-1, (heads, -1))
        if S != T:
            value_BHd = torch.full_like(value_BHd, torch.nan)
        callback(AttentionCall.of_map(module, weights_BHTS, value_BHd))

    with ExitStack() as stack:
        if "output_attentions" in inspect.signature(attention.module.forward).parameters:
            # Others return it unasked; asking would make transformers add hooks for good.
            stack.callback(model.register_forward_pre_hook(ask, with_kwargs=True).remove)
        for handle in (
            attention.output.module.register_forward_pre_hook(project),
            attention.module.register_forward_hook(returned),
        ):
            stack.callback(handle.remove)
        yield


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for each in output:
            yield from _tensors(each)


def _is_causal(weights_BHTS: Tensor) -> bool:
    sums_BHT = weights_BHTS.sum(-1)
    future_BHTS = weights_BHTS.triu(1 + weights_BHTS.shape[-1] - weights_BHTS.shape[-2])
    return bool(((sums_BHT - 1).abs() < _ROW_SUM).all() and not future_BHTS.any())


def _refusal(model: PreTrainedModel, reason: str) -> UserError:
    return UserError(f"model: family {model.config.model_type!r} cannot be measured: {reason}")
