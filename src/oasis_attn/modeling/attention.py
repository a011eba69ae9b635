"""The attention function that transformers' attention modules call, and how to observe its calls.

It is registered under one name with transformers' AttentionInterface, together with a mask function
(without one, transformers silently ignores padding and sliding windows).  A layer of an OASIS model
passes the normalizer, its parameters and the logits of the output gate as keyword arguments through
the family's attention module.  A native model (of the family's own class) passes none of them and
gets softmax.  The function returns the null probability `[B, H, T]` in place of the attention
weights; every family's attention module passes its second result on unchanged.

Axes: B batch, H query heads, G key heads, T queries, S keys, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.attention_call import AttentionCall as AttentionCall
from oasis_attn.modeling.attention_maps import observed_map, selected_keys_mask
from oasis_attn.modeling.configuration_oasis import ATTENTION
from oasis_attn.modeling.decoder_map import decoder_map, find_decoder, find_layers
from oasis_attn.modeling.hf_compat import (
    attention_implementation,
    create_position_bias_mask,
    eager_mask,
    sdpa_attention_forward,
    sdpa_mask,
    set_attention_implementation,
    supports_boolean_masks,
    uses_attention_interface,
)
from oasis_attn.ops.normalizers import WITH_NULL_LOGIT, TokenNormalizer, resolve_normalizer
from oasis_attn.ops.null_attention import (
    attend,
    can_use_decode_kernel,
    decode_attention,
    naive_mix,
    naive_weights,
    null_of_call,
)

MapObserver = Callable[[AttentionCall], None]
SOFTMAX, LEARNED_SINK = (resolve_normalizer("normalizer", x) for x in ("softmax", "learned_sink"))
_WITH_ADDITIVE_MASKS = f"{ATTENTION}-additive"  # for families that expect such masks
_observers: list[MapObserver] = []


def oasis_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    normalizer: TokenNormalizer = SOFTMAX,
    null_logit: float | Tensor = -torch.inf,
    null_key: Tensor | None = None,
    null_value: Tensor | None = None,
    output_gate: Tensor | None = None,
    map_observer: MapObserver | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention with the model's normalizer.

    Args:
        query: `[B, H, T, d]`.
        key, value: `[B, G, S, d]`.
        attention_mask: boolean (True: may attend) or additive; None means causal.
        s_aux: learned sinks `[H]` of the family (gpt-oss), used as null logits.
        sinks: the same for each query, `[B, H, T, 1]` (Inkling 2).
        normalizer: see `OasisConfig`.
        null_logit, null_key, null_value: see `null_attention`.
        output_gate: logits of the output gate, `[B, T, H]` or `[B, T, H * d]`; the output is
            multiplied by their sigmoid.
        map_observer: receives the call, with the attention matrix, which is otherwise not stored.
        position_bias: `[B, H, T, S]`, added to the logits.
        is_causal: whether a query attends only to keys before it if there is no mask; by default,
            as the attention module says.
        indices, block_indices: the keys, or blocks of keys, that the family's indexer selects for
            every query; the others are masked.

    Returns:
        The output `[B, T, H, d]`, and the null probability `[B, H, T]`, or None if softmax was
        computed without it.
    """
    if indices is not None or block_indices is not None:
        attention_mask = selected_keys_mask(
            module, query, key, attention_mask, indices, block_indices, kwargs.get("position_ids")
        )
    if s_aux is not None:
        null_logit = s_aux
    if (s_aux is not None or sinks is not None) and normalizer is SOFTMAX:
        normalizer = LEARNED_SINK
    if sinks is not None:
        null_logit = -torch.inf  # `sinks` are the only null
    device = query.device.type
    if torch.is_autocast_enabled(device):  # cast as SDPA does: rotary embedding returns float32
        precision = torch.get_autocast_dtype(device)
        query, key, value = query.to(precision), key.to(precision), value.to(precision)
    T = query.shape[2]
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if position_bias is not None:
        attention_mask = create_position_bias_mask(
            position_bias, attention_mask, is_causal, query, key
        )
    softmax = normalizer.name == "softmax"
    if softmax:
        null_logit = -torch.inf
    weights_free = softmax or normalizer.name in WITH_NULL_LOGIT
    needs_weights = map_observer is not None or not weights_free
    observers = _observers if map_observer is None else [*_observers, map_observer]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    null: dict[str, Any] = {
        "null_logit": null_logit, "null_key": null_key, "null_value": null_value,
    }  # fmt: skip
    if softmax and softcap is None and not (needs_weights or observers):
        out_BTHd, null_BHT = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, **kwargs,
        )  # fmt: skip
    elif (
        attention_mask is None
        and can_use_decode_kernel(query, value)
        and softcap is None
        and sinks is None
        and not (needs_weights or dropout or observers)
    ):
        out_BHTd, null_BHT = decode_attention(query, key, value, scale=scale, **null)
        out_BTHd = out_BHTd.transpose(1, 2)
    else:
        if attention_mask is None and T > 1:
            key, value = key[:, :, :T], value[:, :, :T]  # a static cache has unused positions
        causal = attention_mask is None and is_causal
        if not needs_weights:
            out_BHTd, null_BHT, lse_BHT = attend(
                query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scale,
                softcap=softcap, dropout=dropout, **null,
            )  # fmt: skip
            if sinks is not None:
                gap_BHT = sinks.squeeze(-1).to(lse_BHT.dtype) - lse_BHT
                out_BHTd = out_BHTd * torch.sigmoid(-gap_BHT).unsqueeze(-1).to(out_BHTd.dtype)
                null_BHT, lse_BHT = gap_BHT.sigmoid(), lse_BHT + F.softplus(gap_BHT)
            weights_BHTS = null_output_BHTd = None
        else:
            if causal:
                visible = torch.ones(T, key.shape[2], dtype=torch.bool, device=query.device)
                attention_mask = visible.tril(key.shape[2] - T)[None, None]
            of_call = null_of_call(query, key.shape[1], scale=scale, softcap=softcap, **null)
            logit_BHT = of_call.logit_BHT if sinks is None else sinks.squeeze(-1)
            weights_BHTS, null_BHT, lse_BHT = naive_weights(
                query, key, attn_mask=attention_mask, scale=scale, softcap=softcap,
                null_logit=logit_BHT, normalizer=normalizer,
            )  # fmt: skip
            null_output_BHTd = of_call.output(null_BHT, dropout)
            out_BHTd = naive_mix(weights_BHTS, value, dropout, null_output_BHTd).to(query.dtype)
        if observers:
            call = AttentionCall(
                module, query, key, value, null_BHT, attention_mask, scale, softcap, lse_BHT,
                weights_BHTS, null_output_BHTd,
            )  # fmt: skip
            for observer in tuple(observers):
                observer(call)
        out_BTHd = out_BHTd.transpose(1, 2).contiguous()  # afmoe calls .view
    if output_gate is not None:
        B, T, H, _ = out_BTHd.shape
        out_BTHd = out_BTHd * torch.sigmoid(output_gate).view(B, T, H, -1)
    return out_BTHd, null_BHT


AttentionInterface.register(ATTENTION, oasis_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
AttentionInterface.register(_WITH_ADDITIVE_MASKS, oasis_attention)
AttentionMaskInterface.register(_WITH_ADDITIVE_MASKS, eager_mask)


@contextmanager
def observe_attention(
    model: PreTrainedModel, callback: Callable[[AttentionCall], None]
) -> Iterator[None]:
    """Context in which `callback` receives every softmax attention call of the decoder of `model`.

    A native transformers decoder uses `oasis_attention` in this context, which computes its softmax
    with the same kernel; the previous attention is restored at the end.  Attention modules that do
    not use the attention interface return their maps, which `callback` receives.

    Raises:
        UserError: the list of the decoder's layers was not found; by a forward pass of a native
            decoder that was already running, because its masks were made for another attention.
    """
    if attention_implementation(model.config) != ATTENTION:
        with _observed_natively(model, callback):
            yield
        return
    modules = set(model.modules())

    def observer(call: AttentionCall) -> None:
        if call.module in modules:
            callback(call)

    with _observed(observer):
        yield


@contextmanager
def _observed_natively(
    model: PreTrainedModel, callback: Callable[[AttentionCall], None]
) -> Iterator[None]:
    decoder: Any = find_decoder(model).module
    _, layers = find_layers(model)
    running: list[int] = []  # the layer that is running, whose attention may be shared or nested

    def observer(call: AttentionCall) -> None:
        if running:
            callback(call.in_layer(running[-1]))

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            for handle in (
                layer.register_forward_pre_hook(lambda *_, i=index: running.append(i)),
                layer.register_forward_hook(lambda *_: running.clear(), always_call=True),
            ):
                stack.callback(handle.remove)
        before = attention_implementation(decoder.config)
        if uses_attention_interface(decoder):
            decoder.set_attn_implementation(
                ATTENTION if supports_boolean_masks(decoder) else _WITH_ADDITIVE_MASKS
            )
            stack.callback(decoder.set_attn_implementation, before)
            stack.enter_context(_running_passes_refused(model))
            stack.enter_context(_observed(observer))
        else:
            set_attention_implementation(decoder.config, "eager")  # which has a map to return
            stack.callback(set_attention_implementation, decoder.config, before)
            for mapped in decoder_map(model).layers:
                if mapped.attention is not None:
                    stack.enter_context(observed_map(model, mapped.attention, observer))
        yield


@contextmanager
def _running_passes_refused(model: PreTrainedModel) -> Iterator[None]:
    """Context in which attention raises `UserError` in a forward pass that began before it."""
    begun = False

    def begin(*_: Any) -> None:
        nonlocal begun
        begun = True

    def check(*_: Any) -> None:
        if not begun:
            raise UserError(
                "model: observe_attention was opened in the middle of a forward pass; open it"
                " before the pass"
            )

    with ExitStack() as stack:
        for module in model.modules():
            hook = begin if isinstance(module, PreTrainedModel) else check
            if hook is begin or hasattr(module, "layer_idx"):
                stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def _observed(observer: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Context in which `observer` receives every call of `oasis_attention`."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
