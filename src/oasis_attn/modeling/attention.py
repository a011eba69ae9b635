"""Our attention function, as transformers' attention modules call it, and the tap on it.

It is registered under one name with transformers' AttentionInterface, together with a mask function
(without one, transformers drops padding and sliding windows silently).  A layer of ours passes the
method's settings as keyword arguments through its family's attention module; a native model passes
none and gets its own softmax.  The null mass `[B, H, T]` is returned in the slot of the attention
weights, which every family hands back untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import (
    create_position_bias_mask,
    sdpa_attention_forward,
)
from transformers.masking_utils import sdpa_mask

from oasis_attn.errors import UserError
from oasis_attn.modeling.configuration import ATTENTION
from oasis_attn.ops.normalizers import TokenNormalizer, resolve_normalizer
from oasis_attn.ops.null_attention import attend, attend_one, attends_one, naive_mix, naive_weights

SOFTMAX = resolve_normalizer("normalizer", "softmax")
_INDICES = ("indices", "block_indices")  # how families name the keys that an indexer picked
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
    output_gate: Tensor | None = None,
    output_attentions: bool = False,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend; returns `out_BTHd` and the null mass `[B, H, T]`, None where softmax has none.

    Args:
        query, key, value: `[B, H, T, d]`, `[B, G, S, d]`; attention_mask: boolean or additive, or
            None for causal.
        s_aux: learned sinks `[H]` of a native family (gpt-oss): null logits.
        normalizer, null_logit: see `OasisConfig`; the default is the native softmax.
        output_gate: gate logits `[B, T, H]` or `[B, T, H * d]`.
        output_attentions: compute the map itself and hand it to the observers.
        position_bias: `[B, H, T, S]`, added to the logits.

    Raises:
        UserError: a family whose attention sees only the keys that an indexer picks: transformers
            puts them into the mask for its own implementations alone.
    """
    if any(kwargs.get(name) is not None for name in _INDICES):
        config: Any = module.config
        raise UserError(
            f"model: family {config.model_type!r} attends only to keys that an indexer "
            f"picks, which the attention {ATTENTION!r} does not support"
        )
    if s_aux is not None:
        normalizer, null_logit = resolve_normalizer("normalizer", "learned_sink"), s_aux
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as scaled_dot_product_attention: rotation is float32
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
    mapped = output_attentions or normalizer.name not in ("softmax", "softmax1", "learned_sink")
    if softmax and softcap is None and not (mapped or _observers):
        out_BTHd, null_BHT = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    elif (
        attention_mask is None
        and attends_one(query, value)
        and softcap is None
        and not (mapped or dropout or _observers)
    ):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out_BHTd, null_BHT = attend_one(query, key, value, scale=scale, null_logit=null_logit)
        out_BTHd = out_BHTd.transpose(1, 2)
    else:
        if attention_mask is None and T > 1:
            key, value = key[:, :, :T], value[:, :, :T]  # a static cache is longer than its content
        causal = attention_mask is None and getattr(module, "is_causal", True)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if not mapped:
            out_BHTd, null_BHT, total_BHT = attend(
                query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scale,
                null_logit=null_logit, softcap=softcap, dropout=dropout,
            )  # fmt: skip
            weights_BHTS = None
        else:
            if causal:
                visible = torch.ones(T, key.shape[2], dtype=torch.bool, device=query.device)
                attention_mask = visible.tril(key.shape[2] - T)[None, None]
            weights_BHTS, null_BHT, total_BHT = naive_weights(
                query, key, attn_mask=attention_mask, scale=scale, softcap=softcap,
                null_logit=null_logit, normalizer=normalizer,
            )  # fmt: skip
            out_BHTd = naive_mix(weights_BHTS, value, dropout).to(query.dtype)
        if _observers:
            call = AttentionCall(
                module,
                query,
                key,
                value,
                null_BHT,
                attention_mask,
                scale,
                softcap,
                total_BHT,
                weights_BHTS,
            )
            for observer in tuple(_observers):
                observer(module, call)
        out_BTHd = out_BHTd.transpose(1, 2)
    if output_gate is not None:
        B, T, H, _ = out_BTHd.shape
        out_BTHd = out_BTHd * torch.sigmoid(output_gate).view(B, T, H, -1)
    return out_BTHd, null_BHT


AttentionInterface.register(ATTENTION, oasis_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@dataclass(frozen=True)
class AttentionCall:
    """What one attention module computed in one forward pass, for measuring; no map is stored."""

    module: nn.Module
    query_BHTd: Tensor
    key_BGSd: Tensor
    value_BGSd: Tensor
    null_BHT: Tensor
    _mask: Tensor | None
    _scale: float
    _softcap: float | None
    _total_BHT: Tensor
    weights_BHTS: Tensor | None

    @property
    def layer(self) -> int:
        """Index of the decoder layer."""
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    def column(self, position: int) -> Tensor:
        """p on key `position` for every query, `[B, H, T]`, float32; 0 where it is not seen."""
        if self.weights_BHTS is not None:
            return self.weights_BHTS[..., position]
        every = slice(0, self.query_BHTd.shape[2])
        return self._part(every, slice(position, position + 1)).squeeze(-1)

    def rows(self, start: int, stop: int) -> Tensor:
        """p of queries `start` to `stop` (exclusive) on the keys from the first to the last that
        any of them may see, `[B, H, stop - start, S']`, float32."""
        if self.weights_BHTS is not None:
            return self.weights_BHTS[:, :, start:stop]
        T, S = self.query_BHTd.shape[2], self.key_BGSd.shape[2]
        end = S if self._mask is not None else S - T + stop
        return self._part(slice(start, stop), slice(0, end))

    def _part(self, queries: slice, keys: slice) -> Tensor:
        """p of some queries on some keys, from the finished log-denominators."""
        T, S = self.query_BHTd.shape[2], self.key_BGSd.shape[2]
        groups = self.query_BHTd.shape[1] // self.key_BGSd.shape[1]
        precise = self._total_BHT.dtype
        key_BHSd = self.key_BGSd[:, :, keys].to(precise).repeat_interleave(groups, 1)
        query_BHTd = self.query_BHTd[:, :, queries].to(precise)
        scores_BHTS = (query_BHTd @ key_BHSd.transpose(-1, -2)).mul_(self._scale)
        if self._softcap is not None:
            scores_BHTS = self._softcap * torch.tanh(scores_BHTS / self._softcap)
        if self._mask is None:
            positions = torch.arange(S, device=scores_BHTS.device)
            unseen = positions[keys] > positions[S - T :][queries].unsqueeze(-1)
            scores_BHTS = scores_BHTS.masked_fill_(unseen, -torch.inf)
        elif self._mask.dtype == torch.bool:
            scores_BHTS = scores_BHTS.masked_fill_(~self._mask[..., queries, keys], -torch.inf)
        else:
            scores_BHTS = scores_BHTS + self._mask[..., queries, keys]
        return scores_BHTS.sub_(self._total_BHT[..., queries, None]).exp_()


@contextmanager
def observe_attention(
    model: PreTrainedModel, callback: Callable[[AttentionCall], None]
) -> Iterator[None]:
    """While open, every attention module of `model` hands `callback` what it computed.

    A native transformers decoder is switched to our function, which computes its own softmax from
    the same kernel, and back at the end.
    """
    modules = set(model.modules())

    def observer(module: nn.Module, call: AttentionCall) -> None:
        if module in modules:
            callback(call)

    before = model.config._attn_implementation
    if before != ATTENTION:
        model.set_attn_implementation(ATTENTION)
    try:
        with observed(observer):
            yield
    finally:
        if before != ATTENTION:
            model.set_attn_implementation(before)


@contextmanager
def observed(observer: Callable[[nn.Module, AttentionCall], None]) -> Iterator[None]:
    """While open, `observer` is handed every call of `oasis_attention`, with its module."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
