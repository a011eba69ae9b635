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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.configuration_oasis import ATTENTION
from oasis_attn.modeling.hf_compat import (
    attention_implementation,
    create_position_bias_mask,
    sdpa_attention_forward,
    sdpa_mask,
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

SOFTMAX, LEARNED_SINK = (resolve_normalizer("normalizer", x) for x in ("softmax", "learned_sink"))
_INDICES = ("indices", "block_indices")  # the families' arguments for keys that an indexer selects
_observers: list[Callable[[nn.Module, AttentionCall], None]] = []


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
    normalizer: TokenNormalizer = SOFTMAX,
    null_logit: float | Tensor = -torch.inf,
    null_key: Tensor | None = None,
    null_value: Tensor | None = None,
    output_gate: Tensor | None = None,
    attention_map: bool = False,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention with the model's normalizer.

    Args:
        query: `[B, H, T, d]`.
        key, value: `[B, G, S, d]`.
        attention_mask: boolean (True: may attend) or additive; None means causal.
        s_aux: learned sinks `[H]` of the family (gpt-oss), used as null logits.
        normalizer: see `OasisConfig`.
        null_logit, null_key, null_value: see `null_attention`.
        output_gate: logits of the output gate, `[B, T, H]` or `[B, T, H * d]`; the output is
            multiplied by their sigmoid.
        attention_map: compute the attention matrix and pass it to the observers.
        position_bias: `[B, H, T, S]`, added to the logits.

    Returns:
        The output `[B, T, H, d]`, and the null probability `[B, H, T]`, or None if softmax was
        computed without it.

    Raises:
        UserError: the family attends only to keys that an indexer selects; transformers adds them
            to the mask only for its own implementations.
    """
    if any(kwargs.get(name) is not None for name in _INDICES):
        config: Any = module.config
        raise UserError(
            f"model: family {config.model_type!r} attends only to keys that an indexer selects,"
            f" which the attention {ATTENTION!r} does not support"
        )
    if s_aux is not None:
        null_logit = s_aux
        if normalizer is SOFTMAX:
            normalizer = LEARNED_SINK
    device = query.device.type
    if torch.is_autocast_enabled(device):  # cast as SDPA does: rotary embedding returns float32
        precision = torch.get_autocast_dtype(device)
        query, key, value = query.to(precision), key.to(precision), value.to(precision)
    T = query.shape[2]
    if position_bias is not None:
        causal = getattr(module, "is_causal", True)
        attention_mask = create_position_bias_mask(
            position_bias, attention_mask, causal, query, key
        )
    softmax = normalizer.name == "softmax"
    if softmax:
        null_logit = -torch.inf
    weights_free = softmax or normalizer.name in WITH_NULL_LOGIT
    needs_weights = attention_map or not weights_free
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    null: dict[str, Any] = {
        "null_logit": null_logit, "null_key": null_key, "null_value": null_value,
    }  # fmt: skip
    if softmax and softcap is None and not (needs_weights or _observers):
        out_BTHd, null_BHT = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    elif (
        attention_mask is None
        and can_use_decode_kernel(query, value)
        and softcap is None
        and not (needs_weights or dropout or _observers)
    ):
        out_BHTd, null_BHT = decode_attention(query, key, value, scale=scale, **null)
        out_BTHd = out_BHTd.transpose(1, 2)
    else:
        if attention_mask is None and T > 1:
            key, value = key[:, :, :T], value[:, :, :T]  # a static cache has unused positions
        causal = attention_mask is None and getattr(module, "is_causal", True)
        if not needs_weights:
            out_BHTd, null_BHT, lse_BHT = attend(
                query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scale,
                softcap=softcap, dropout=dropout, **null,
            )  # fmt: skip
            weights_BHTS = null_output_BHTd = None
        else:
            if causal:
                visible = torch.ones(T, key.shape[2], dtype=torch.bool, device=query.device)
                attention_mask = visible.tril(key.shape[2] - T)[None, None]
            of_call = null_of_call(query, key.shape[1], scale=scale, softcap=softcap, **null)
            weights_BHTS, null_BHT, lse_BHT = naive_weights(
                query, key, attn_mask=attention_mask, scale=scale, softcap=softcap,
                null_logit=of_call.logit_BHT, normalizer=normalizer,
            )  # fmt: skip
            null_output_BHTd = of_call.output(null_BHT, dropout)
            out_BHTd = naive_mix(weights_BHTS, value, dropout, null_output_BHTd).to(query.dtype)
        if _observers:
            call = AttentionCall(
                module, query, key, value, null_BHT, attention_mask, scale, softcap, lse_BHT,
                weights_BHTS, null_output_BHTd,
            )  # fmt: skip
            for observer in tuple(_observers):
                observer(module, call)
        out_BTHd = out_BHTd.transpose(1, 2).contiguous()  # afmoe calls .view
    if output_gate is not None:
        B, T, H, _ = out_BTHd.shape
        out_BTHd = out_BTHd * torch.sigmoid(output_gate).view(B, T, H, -1)
    return out_BTHd, null_BHT


AttentionInterface.register(ATTENTION, oasis_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@dataclass(frozen=True)
class AttentionCall:
    """The inputs and results of one attention module in one forward pass, for measurements.

    The attention matrix is not stored, unless the forward pass computed it; `column` and `rows`
    recompute the probabilities that they return.  `null_output_BHTd` is what the null adds to the
    output, if it has a value and the attention matrix was computed.
    """

    module: nn.Module
    query_BHTd: Tensor
    key_BGSd: Tensor
    value_BGSd: Tensor
    null_BHT: Tensor
    _mask: Tensor | None
    _scale: float
    _softcap: float | None
    _lse_BHT: Tensor
    weights_BHTS: Tensor | None
    null_output_BHTd: Tensor | None

    @property
    def layer(self) -> int:
        """Index of the decoder layer."""
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    @property
    def null_logit_BHT(self) -> Tensor:
        """The logit of the null for every query, `[B, H, T]`; of several, their log-sum-exp."""
        smallest = torch.finfo(self.null_BHT.dtype).tiny
        return self.null_BHT.clamp(min=smallest).log() + self._lse_BHT

    def column(self, position: int) -> Tensor:
        """Probability of key `position` for every query, `[B, H, T]`, float32; 0 where masked."""
        if self.weights_BHTS is not None:
            return self.weights_BHTS[..., position]
        all_queries = slice(0, self.query_BHTd.shape[2])
        return self._probabilities(all_queries, slice(position, position + 1)).squeeze(-1)

    def rows(self, start: int, stop: int, step: int = 1) -> Tensor:
        """Probabilities of the queries in `range(start, stop, step)`, `[B, H, queries, S']`,
        float32.  S' counts the keys up to the last one that a query before `stop` attends to."""
        if self.weights_BHTS is not None:
            return self.weights_BHTS[:, :, start:stop:step]
        T, S = self.query_BHTd.shape[2], self.key_BGSd.shape[2]
        end = S if self._mask is not None else S - T + stop
        return self._probabilities(slice(start, stop, step), slice(0, end))

    def _probabilities(self, queries: slice, keys: slice) -> Tensor:
        """Probabilities of the given queries and keys, recomputed from the log-sum-exps."""
        T, S = self.query_BHTd.shape[2], self.key_BGSd.shape[2]
        groups = self.query_BHTd.shape[1] // self.key_BGSd.shape[1]
        precise = self._lse_BHT.dtype
        key_BHSd = self.key_BGSd[:, :, keys].to(precise).repeat_interleave(groups, 1)
        query_BHTd = self.query_BHTd[:, :, queries].to(precise)
        scores_BHTS = (query_BHTd @ key_BHSd.transpose(-1, -2)).mul_(self._scale)
        if self._softcap is not None:
            scores_BHTS = self._softcap * torch.tanh(scores_BHTS / self._softcap)
        if self._mask is None:
            positions = torch.arange(S, device=scores_BHTS.device)
            future = positions[keys] > positions[S - T :][queries].unsqueeze(-1)
            scores_BHTS = scores_BHTS.masked_fill_(future, -torch.inf)
        elif self._mask.dtype == torch.bool:
            scores_BHTS = scores_BHTS.masked_fill_(~self._mask[..., queries, keys], -torch.inf)
        else:
            scores_BHTS = scores_BHTS + self._mask[..., queries, keys]
        return scores_BHTS.sub_(self._lse_BHT[..., queries, None]).exp_()


@contextmanager
def observe_attention(
    model: PreTrainedModel, callback: Callable[[AttentionCall], None]
) -> Iterator[None]:
    """Context in which `callback` receives every attention call of `model`.

    A native transformers decoder uses `oasis_attention` in this context, which computes its softmax
    with the same kernel; the previous attention is restored at the end.

    Raises:
        UserError: by a forward pass of such a decoder that was already running, because its masks
            were made for another attention.
    """
    modules = set(model.modules())

    def observer(module: nn.Module, call: AttentionCall) -> None:
        if module in modules:
            callback(call)

    before = attention_implementation(model.config)
    with ExitStack() as stack:
        if before != ATTENTION:
            model.set_attn_implementation(ATTENTION)
            stack.callback(model.set_attn_implementation, before)
            stack.enter_context(_running_passes_refused(model))
        stack.enter_context(observed(observer))
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
def observed(observer: Callable[[nn.Module, AttentionCall], None]) -> Iterator[None]:
    """Context in which `observer` receives every call of `oasis_attention` and its module."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
