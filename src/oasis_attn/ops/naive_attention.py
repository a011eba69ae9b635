"""Attention with a null option in plain PyTorch: stores the map `[B, H, T, S]`, float32 inside.

Axes: B batch, H query heads, G key heads (H a multiple of G), T queries, S keys, d head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oasis_attn.errors import UserError
from oasis_attn.ops.normalizers import TokenNormalizer, normalize


def naive_weights(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None,
    scale: float,
    softcap: float | None,
    null_logit: Tensor | float = 0.0,
    normalizer: str | TokenNormalizer = "softmax1",
) -> tuple[Tensor, Tensor, Tensor]:
    """The map itself, by any normalizer: weights `[B, H, T, S]`, null and log-denominator."""
    attn_mask = four_axes(attn_mask, query, key)
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups = query.shape[1] // key.shape[1]
    key_BHSd = key.to(precise).repeat_interleave(groups, dim=1)
    with torch.autocast(query.device.type, enabled=False):
        scores_BHTS = query.to(precise) @ key_BHSd.transpose(-1, -2) * scale
    if softcap is not None:
        scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores_BHTS = scores_BHTS + attn_mask.to(precise)
        attn_mask = None
    if isinstance(null_logit, Tensor):
        null_logit = null_logit.to(precise).reshape(-1, 1)
    weights_BHTS, null_BHT = normalize(
        scores_BHTS, normalizer, mask=attn_mask, null_logit=null_logit
    )
    with torch.no_grad():
        if attn_mask is not None:
            scores_BHTS = scores_BHTS.masked_fill(~attn_mask, -math.inf)
        null_logit = torch.as_tensor(null_logit, dtype=precise, device=query.device)
        total_BHT = log_denominator(scores_BHTS.logsumexp(-1), null_logit)
    return weights_BHTS, null_BHT, total_BHT


def naive_mix(weights_BHTS: Tensor, value_BGSd: Tensor, dropout: float = 0.0) -> Tensor:
    """Weighted values `[B, H, T, d]`, in the dtype of the weights."""
    if dropout:
        weights_BHTS = torch.dropout(weights_BHTS, dropout, train=True)
    groups = weights_BHTS.shape[1] // value_BGSd.shape[1]
    value_BHSd = value_BGSd.to(weights_BHTS.dtype).repeat_interleave(groups, dim=1)
    with torch.autocast(value_BGSd.device.type, enabled=False):
        return weights_BHTS @ value_BHSd


def log_denominator(lse: Tensor, null_logit: Tensor) -> Tensor:
    """log(exp(c) + sum exp(s)); finite where nothing may be seen and c is -inf: there p is 0."""
    total = torch.logaddexp(lse, null_logit)
    return total.clamp(min=torch.finfo(total.dtype).min)


def with_causal(mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
    """`mask` that also hides from query t the keys behind t + S - T."""
    causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    if mask is None:
        return causal[None, None]
    if mask.dtype == torch.bool:
        return mask & causal
    return mask.masked_fill(~causal, -math.inf)


def four_axes(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """`mask` with leading axes of size 1, so that it has four; `UserError` if it does not fit."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise UserError(f"attn_mask: {mask!r} is not a tensor")
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    try:
        fits = torch.broadcast_shapes(mask.shape, full) == full
    except RuntimeError:
        fits = False
    if not fits:
        raise UserError(f"attn_mask: shape {list(mask.shape)} does not broadcast to {list(full)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise UserError(f"attn_mask: dtype {mask.dtype} is neither boolean nor floating point")
    return mask if mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]
