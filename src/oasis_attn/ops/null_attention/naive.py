"""Attention with a null option in plain PyTorch: the reference for all other backends.

It stores the attention matrix `[B, H, T, S]` and computes in float32 (float64 for float64 inputs).

Axes: B batch, H query heads, G key heads (H a multiple of G), T queries, S keys, d head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oasis_attn.errors import UserError
from oasis_attn.ops.normalizers import TokenNormalizer, normalize
from oasis_attn.ops.null_attention.null import Null


def naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null: Null,
    *,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, H, T, d]`, null probability and log-sum-exp over keys and null, `[B, H, T]`."""
    weights_BHTS, null_BHT, lse_BHT = naive_weights(
        query, key, attn_mask=mask, scale=scale, softcap=softcap, null_logit=null.logit_BHT
    )
    out_BHTd = naive_mix(weights_BHTS, value, dropout, null.output(null_BHT, dropout))
    return out_BHTd.to(query.dtype), null_BHT, lse_BHT


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
    """Attention weights `[B, H, T, S]`, null probability and log-sum-exp, both `[B, H, T]`.

    The log-sum-exp is over the keys and the null.  `null_logit` is broadcastable to `[B, H, T]`;
    `normalizer` is any of `NORMALIZERS`.
    """
    attn_mask = to_four_axes(attn_mask, query, key)
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
    weights_BHTS, null_BHT = normalize(
        scores_BHTS, normalizer, mask=attn_mask, null_logit=null_logit
    )
    with torch.no_grad():
        if attn_mask is not None:
            scores_BHTS = scores_BHTS.masked_fill(~attn_mask, -math.inf)
        null_logit = torch.as_tensor(null_logit, dtype=precise, device=query.device)
        lse_BHT = lse_with_null(scores_BHTS.logsumexp(-1), null_logit)
    return weights_BHTS, null_BHT, lse_BHT


def naive_mix(
    weights_BHTS: Tensor,
    value_BGSd: Tensor,
    dropout: float = 0.0,
    null_output_BHTd: Tensor | None = None,
) -> Tensor:
    """The weighted sum of the values, `[B, H, T, d]`, in the dtype of the weights.

    `null_output_BHTd`, what the null contributes, is added to it.
    """
    if dropout:
        weights_BHTS = torch.dropout(weights_BHTS, dropout, train=True)
    groups = weights_BHTS.shape[1] // value_BGSd.shape[1]
    value_BHSd = value_BGSd.to(weights_BHTS.dtype).repeat_interleave(groups, dim=1)
    with torch.autocast(value_BGSd.device.type, enabled=False):
        out_BHTd = weights_BHTS @ value_BHSd
    return out_BHTd if null_output_BHTd is None else out_BHTd + null_output_BHTd


def lse_with_null(lse: Tensor, null_logit: Tensor) -> Tensor:
    """log(exp(c) + sum exp(s)), from `lse` = log(sum exp(s)) and c.

    The result is finite even if all keys are masked and c is -inf, so that exp(s - lse) is 0.
    """
    joint = torch.logaddexp(lse, null_logit)
    return joint.clamp(min=torch.finfo(joint.dtype).min)


def add_causal_mask(mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
    """`mask` combined with a causal mask: query t attends to keys up to t + S - T."""
    causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    if mask is None:
        return causal[None, None]
    if mask.dtype == torch.bool:
        return mask & causal
    return mask.masked_fill(~causal, -math.inf)


def to_four_axes(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Add leading axes of size 1 to `mask` until it has four axes.

    Raises:
        UserError: it does not broadcast to `[B, H, T, S]`, or it is neither boolean nor float.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise UserError(f"attn_mask: {mask!r} is not a tensor")
    shape_BHTS = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    try:
        fits = torch.broadcast_shapes(mask.shape, shape_BHTS) == shape_BHTS
    except RuntimeError:
        fits = False
    if not fits:
        raise UserError(
            f"attn_mask: shape {list(mask.shape)} does not broadcast to {list(shape_BHTS)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise UserError(f"attn_mask: dtype {mask.dtype} is neither boolean nor floating point")
    return mask if mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]
