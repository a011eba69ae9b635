"""Positions of tokens in packed rows and in rows with padding.

Packed rows are several sequences in one row, separated by `position_ids` that restart.

transformers separates such sequences only if there is neither a cache nor a mask, and only in
families that pass their positions to the mask function.  OASIS models always separate them, or
raise an error.

Axes: B batch, T tokens, S tokens that the mask covers, including those in a cache.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.hf_compat import create_masks_for_generate, is_tracing
from oasis_attn.ops.torch_compat import assert_async

_NOT_WITH_A_CACHE = (
    "position_ids: they restart within a row, but a cache holds one sequence per row; for packed"
    " sequences pass use_cache=False and no past_key_values"
)
_WITHOUT_POSITIONS = (
    "attention_mask: a mask [B, 1, T, S] that hides the first key does not tell where a row begins,"
    " on which the distance to null keys depends; pass position_ids too"
)


def with_packed_masks(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The `kwargs` of a base model's forward pass, with masks that separate packed sequences.

    A mask that is not `[B, S]` is passed on unchanged: the caller has decided what attends to what.

    Raises:
        UserError: packed sequences with a cache or with padding; positions that skip ahead;
            sequence boundaries without `position_ids`.
    """
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is None:
        for name in ("cu_seq_lens_q", "seq_idx"):
            if kwargs.get(name) is not None:
                raise UserError(
                    f"{name}: packed sequences also need position_ids that restart at 0"
                )
        return kwargs
    two_axes = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    if positions.ndim != 2 or positions.shape[1] == 1 or not two_axes:
        return kwargs
    cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
    single = is_one_sequence(positions, mask, 0 if cache is None else cache.get_seq_length())
    if is_tracing(positions):  # tracing cannot branch on values
        if use_cache is None:
            use_cache = model.config.use_cache
        if mask is None and cache is None and not use_cache:
            return kwargs | _separate(model, input_of(args, kwargs), positions)
        # Not torch_compilable_check of transformers: it synchronizes, and an export removes it.
        assert_async(single, _NOT_WITH_A_CACHE)
        return kwargs
    if single:
        return kwargs

    if cache is not None or use_cache:
        raise UserError(_NOT_WITH_A_CACHE)
    if mask is not None and not mask.all():
        raise UserError(
            "attention_mask: it has zeros, and position_ids restart within a row; remove padding"
            " from packed rows, or pass a mask [B, 1, T, T]"
        )
    if (positions.diff(dim=-1) > 1).any():
        raise UserError(
            "position_ids: they skip positions within a row, so it is not clear where a sequence"
            " begins; pass an attention_mask [B, 1, T, T]"
        )
    return kwargs | _separate(model, input_of(args, kwargs), positions)


def is_one_sequence(
    position_ids_BT: Tensor, attention_mask_BS: Tensor | None, past: int = 0
) -> Tensor:
    """Whether each row is one sequence that continues the `past` tokens of a cache.

    The positions of one sequence increase by one, or, across padding, by any number.
    """
    steps_BT = position_ids_BT.diff(dim=-1, prepend=position_ids_BT[:, :1] - 1)
    if attention_mask_BS is None:
        return (steps_BT == 1).all() & (position_ids_BT[:, 0] >= past).all()
    seen_BS, T = attention_mask_BS.bool(), position_ids_BT.shape[1]
    earlier_B1, seen_BT = seen_BS[:, :-T].sum(-1, keepdim=True), seen_BS[:, -T:]
    highest_BT = torch.cat([earlier_B1 - 1, position_ids_BT.where(seen_BT, -1)], 1).cummax(1)[0]
    after_seen_BT = F.pad(seen_BT, (1, -1))
    rises_BT = torch.where(after_seen_BT, steps_BT == 1, position_ids_BT > highest_BT[:, :-1])
    return (rises_BT | ~seen_BT).all()


def padded_positions(attention_mask_BS: Tensor, past: int, length: int) -> Tensor:
    """Positions `[B, length]` of the tokens after `past` ones: each row begins after its padding.

    Distances between tokens are those without the mask, also across tokens that it hides later in
    the row.  Padding before the first token has position 0.
    """
    padding_B1 = attention_mask_BS.ne(0).cumsum(-1).eq(0).sum(-1, keepdim=True)
    positions_T = torch.arange(length, device=attention_mask_BS.device) + past
    return (positions_T - padding_B1).clamp(min=0)


def takes_positions(decoder: type[nn.Module]) -> bool:
    """Whether a decoder has `position_ids`; those that have none count the tokens of the mask."""
    own = [vars(base)["forward"] for base in decoder.__mro__ if "forward" in vars(base)]
    return any("position_ids" in signature(forward).parameters for forward in own)


def smallest_window(config: PreTrainedConfig) -> int | None:
    """The fewest tokens that a layer with a sliding window or chunks attends to; None without."""
    layers: list[Any] = DynamicCache(config=config.get_text_config(decoder=True)).layers
    windows: list[int] = [
        layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)
    ]
    return min(windows, default=None)


def check_no_padding(masks: Any) -> None:
    """Raise `UserError` unless one of `masks` shows that no row begins with padding.

    A mask `[B, 1, T, S]` without padding lets every query attend to the first key.  One that does
    not may have padding, or a sliding window.

    Args:
        masks: one mask, or masks by type of layer; None is a causal mask.
    """
    given = list(masks.values() if isinstance(masks, dict) else [masks])
    device = next((mask.device for mask in given if isinstance(mask, Tensor)), None)
    first = [
        mask[..., 0] if isinstance(mask, Tensor) else torch.tensor(True, device=device)
        for mask in given
    ]
    least = [torch.finfo(x.dtype).min / 2 if x.is_floating_point() else 0 for x in first]
    shown = torch.stack([(x > y).all() for x, y in zip(first, least, strict=True)]).any()
    if is_tracing(shown):  # tracing cannot branch on values
        assert_async(shown, _WITHOUT_POSITIONS)
    elif not shown:
        raise UserError(_WITHOUT_POSITIONS)


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The `input_ids` or `inputs_embeds` of a forward pass."""
    value: Tensor | None
    for value in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if value is not None:
            return value
    raise UserError("input_ids: pass either input_ids or inputs_embeds")


def _separate(model: PreTrainedModel, inputs: Tensor, positions: Tensor) -> dict[str, Any]:
    """Keyword arguments with which sequences packed in `inputs` do not attend to each other."""
    batch, length = inputs.shape[:2]
    masks = create_masks_for_generate(
        model.config,
        inputs_embeds=torch.empty(batch, length, 0, device=inputs.device),  # only its shape is used
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    return {"attention_mask": masks, "use_cache": False}
