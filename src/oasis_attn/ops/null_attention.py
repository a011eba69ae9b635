"""Token attention with a null option, at the price of plain attention (OASIS arXiv 2605.17887).

    p_j = exp(s_j) / (exp(c) + sum_i exp(s_i))        null = exp(c) / (exp(c) + sum_i exp(s_i))

The null is a key of value zero, so nothing but the denominator changes.  A fused softmax kernel
that returns its log-sum-exp `lse` therefore gives both results without a T x T map:

    out = sigmoid(lse - c) * out_softmax              null = sigmoid(c - lse)

and its backward, which recomputes p = exp(s - lse), computes the null form's own gradients when it
is handed `lse' = logaddexp(lse, c)` and the finished `out`.  See `_CpuFlash.backward`.

Axes: B batch, H query heads, G key heads (H a multiple of G), T queries, S keys, d head width.
"""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from oasis_attn.errors import UserError, check_choice
from oasis_attn.ops import native
from oasis_attn.ops.normalizers import normalize

BACKENDS = ("auto", "naive", "cpu_flash", "flex")


class Attended(NamedTuple):
    """What one attention call computed.

    `null_BHT` and `total_BHT`, the log of the whole denominator (null included), are float32, or
    float64 for float64 inputs.  No gradient flows through `total_BHT`.
    """

    out_BHTd: Tensor
    null_BHT: Tensor
    total_BHT: Tensor


def null_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    null_logit: float | Tensor = 0.0,
    softcap: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention whose softmax has a null option, and the mass each query left on it.

    Args:
        query: `[B, H, T, d]`, float32, float64 or bfloat16 (others: `naive` only).
        key, value: `[B, G, S, d]`; H a multiple of G (grouped-query attention).
        attn_mask: broadcastable to `[B, H, T, S]`; boolean (True: may attend), or additive.
        is_causal: query t sees keys up to t + S - T: the last query sees all keys, as in decoding
            from a cache.  (PyTorch aligns the first query with the first key instead.)
        scale: of the logits; default `d ** -0.5`.
        null_logit: c, a number or a tensor `[H]`; 0 is Softmax1, `-inf` is softmax.
        softcap: logits become `softcap * tanh(logits / softcap)` before masking.
        dropout: probability of dropping an attention weight; `naive` only.  The null mass is kept.
        backend: `naive` (plain PyTorch, stores `[B, H, T, S]`, float32 inside), `cpu_flash` (CPU),
            `flex` (CUDA; forward only on CPU), or `auto`: the device's fused one if it can serve
            the call, else `naive`.

    Returns:
        `out_BHTd` in the dtype of `query`, and `null_BHT`, the null mass in [0, 1], in float32 (in
        float64 for float64 inputs).  Both are differentiable in query, key, value and null_logit.
        A query that may see no key has out 0 and null 1.

    Raises:
        UserError: on shapes that do not fit, or when the named backend cannot serve the call.
    """
    attended = attend(
        query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale,
        null_logit=null_logit, softcap=softcap, dropout=dropout, backend=backend,
    )  # fmt: skip
    return attended.out_BHTd, attended.null_BHT


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    null_logit: float | Tensor = 0.0,
    softcap: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Attended:
    """`null_attention`, and the log of its denominator (from which any p_j can be had again)."""
    _check_shapes(query, key, value, attn_mask, null_logit)
    backend = _choose(backend, query, key, value, attn_mask, softcap, dropout)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    T, S = query.shape[2], key.shape[2]
    if is_causal and backend != "flex":
        if T == 1:
            is_causal = False  # bottom-right alignment: the only query sees all
        elif attn_mask is not None or T != S or backend == "naive":
            attn_mask = _with_causal(attn_mask, T, S, query.device)
            is_causal = False
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    null_logit_H = torch.as_tensor(null_logit, dtype=precise, device=query.device).reshape(-1)
    if backend == "cpu_flash":
        width, own = max(query.shape[-1], value.shape[-1]), value.shape[-1]
        query, key, value = (_rows(x, width) for x in (query, key, value))
        arguments = (query, key, value, null_logit_H, attn_mask, is_causal, scale)
        out_BHTd, null_BHT, total_BHT = _CpuFlash.apply(*arguments)
        return Attended(out_BHTd[..., :own] if own < width else out_BHTd, null_BHT, total_BHT)
    if backend == "flex":
        return _flex(query, key, value, null_logit_H, attn_mask, is_causal, scale, softcap)
    weights_BHTS, null_BHT, total_BHT = naive_weights(
        query, key, attn_mask=attn_mask, scale=scale, softcap=softcap, null_logit=null_logit_H
    )
    return Attended(naive_mix(weights_BHTS, value, dropout).to(query.dtype), null_BHT, total_BHT)


def attend_one(
    query_BH1d: Tensor, key: Tensor, value: Tensor, *, scale: float, null_logit: float | Tensor
) -> tuple[Tensor, Tensor]:
    """`null_attention` of one new token a sequence that sees all keys, where `attends_one`."""
    width = query_BH1d.shape[-1]
    query_BH1d, key, value = (_rows(x, width) for x in (query_BH1d, key, value))
    out, lse_BH1 = _flash(query_BH1d, key, value, 0.0, False, scale=scale)
    null_BH1 = torch.empty_like(lse_BH1)
    logits, logit = None, 0.0
    if isinstance(null_logit, Tensor):
        null_logit = null_logit.to(torch.float32).contiguous()
        logits = null_logit.data_ptr()
    else:
        logit = null_logit
    B, H, _, d = query_BH1d.shape
    step = native.library().null_step  # type: ignore[union-attr]
    step(out.data_ptr(), lse_BH1.data_ptr(), null_BH1.data_ptr(), logits, logit, B, H, d)
    return out, null_BH1


def attends_one(query: Tensor, value: Tensor) -> bool:
    """Whether `attend_one` serves this call: float32 on the CPU, no gradient, not being traced."""
    return (
        query.shape[2] == 1
        and query.dtype == value.dtype == torch.float32
        and query.device.type == "cpu"
        and query.shape[3] == value.shape[3]
        and not torch.is_grad_enabled()
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and native.library() is not None
    )


# ---------------------------------------------------------------------------------------- naive


def naive_weights(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None,
    scale: float,
    softcap: float | None,
    null_logit: Tensor | float = 0.0,
    normalizer: str = "softmax1",
    clip_gamma: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The map itself, by any normalizer: weights `[B, H, T, S]`, null and log-denominator."""
    _check_mask(attn_mask, query, key)
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups = query.shape[1] // key.shape[1]
    key_BHSd = key.to(precise).repeat_interleave(groups, dim=1)
    with torch.autocast(query.device.type, enabled=False):
        scores_BHTS = query.to(precise) @ key_BHSd.transpose(-1, -2) * scale
    if softcap is not None:
        scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores_BHTS = scores_BHTS + attn_mask
        attn_mask = None
    if isinstance(null_logit, Tensor):
        null_logit = null_logit.to(precise).reshape(-1, 1)
    weights_BHTS, null_BHT = normalize(
        scores_BHTS, normalizer, mask=attn_mask, null_logit=null_logit, clip_gamma=clip_gamma
    )
    with torch.no_grad():
        if attn_mask is not None:
            scores_BHTS = scores_BHTS.masked_fill(~attn_mask, -math.inf)
        null_logit = torch.as_tensor(null_logit, dtype=precise, device=query.device)
        total_BHT = _log_denominator(scores_BHTS.logsumexp(-1), null_logit)
    return weights_BHTS, null_BHT, total_BHT


def _log_denominator(lse: Tensor, null_logit: Tensor) -> Tensor:
    """log(exp(c) + sum exp(s)); finite where nothing may be seen and c is -inf: there p is 0."""
    total = torch.logaddexp(lse, null_logit)
    return total.clamp(min=torch.finfo(total.dtype).min)


def naive_mix(weights_BHTS: Tensor, value_BGSd: Tensor, dropout: float = 0.0) -> Tensor:
    """Weighted values `[B, H, T, d]`, in the dtype of the weights."""
    if dropout:
        weights_BHTS = torch.dropout(weights_BHTS, dropout, train=True)
    groups = weights_BHTS.shape[1] // value_BGSd.shape[1]
    value_BHSd = value_BGSd.to(weights_BHTS.dtype).repeat_interleave(groups, dim=1)
    with torch.autocast(value_BGSd.device.type, enabled=False):
        return weights_BHTS @ value_BHSd


# ------------------------------------------------------------------------------------ cpu_flash

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _flash_with_null(query, key, value, c, mask, is_causal, scale):
    """The kernel, and from its log-sum-exp: out, null mass, that log-sum-exp.

    `c` is the null logit, a number or `[H, 1]`.
    """
    additive = _additive(mask, query)
    out, lse = _flash(query, key, value, 0.0, is_causal, attn_mask=additive, scale=scale)
    if additive is not None:  # the kernel reports lse 0, not -inf, where nothing may be seen
        blind = additive.amax(-1) == -math.inf
        lse = lse.masked_fill(blind, -math.inf)
    excess = lse - c
    keep, null = torch.sigmoid(excess), torch.sigmoid(-excess)
    if additive is not None:  # also where c is -inf
        keep, null = keep.masked_fill(blind, 0), null.masked_fill(blind, 1)
    return out.mul_(keep.unsqueeze(-1)), null, lse


class _CpuFlash(torch.autograd.Function):
    """PyTorch's CPU flash attention, forward and backward, with the null in the denominator."""

    @staticmethod
    def forward(ctx, query, key, value, null_logit_H, mask, is_causal, scale):
        c = null_logit_H[:, None]
        out, null, lse = _flash_with_null(query, key, value, c, mask, is_causal, scale)
        total = _log_denominator(lse, c)
        ctx.save_for_backward(query, key, value, out, null, total, mask)
        ctx.is_causal, ctx.scale = is_causal, scale
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(total)
        return out, null, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_null, _grad_total):
        # Flash backward: dS = P * (dP - delta), P = exp(s - lse), delta = rowsum(dOut * Out).  With
        # lse' for lse, P is the null form's p, and with its Out all three gradients are its own.  A
        # gradient on null adds -p_j * null * dNull to dS_j, that is, null * dNull to delta.
        query, key, value, out, null, total, mask = ctx.saved_tensors
        if grad_out is None:
            if grad_null is None:
                return (None,) * 7
            grad_out = torch.zeros_like(out)
        grad_c = None
        if ctx.needs_input_grad[3]:
            delta = (grad_out * out).sum(-1, dtype=null.dtype)
            grad_c = -null * delta
            if grad_null is not None:
                grad_c = grad_c + grad_null * null * (1 - null)
            grad_c = grad_c.sum((0, 2))
        shift = None if grad_null is None else null * grad_null
        with _delta_shifted(grad_out, out, shift) as (grad_out, out):
            grad_query, grad_key, grad_value = _flash_backward(
                grad_out,
                query,
                key,
                value,
                out,
                total,
                0.0,
                ctx.is_causal,
                attn_mask=_additive(mask, query),
                scale=ctx.scale,
            )
        return grad_query, grad_key, grad_value, grad_c, None, None, None


@contextmanager
def _delta_shifted(grad_out, out, shift):
    """`grad_out` and `out` such that rowsum(grad_out * out) has grown by `shift`, for a while.

    The kernel reads `out` for that sum alone, so one column of it will do: x in column 0 adds
    grad_out_0 * x.  A grad_out_0 of zero is moved by `tiny`, which no result can feel.  The columns
    are changed in place and put back, for copies of both would be a third of the peak memory.
    """
    if shift is None:
        yield grad_out, out
        return
    if torch.compiler.is_compiling() or _overlap(grad_out, out) or 0 in grad_out.stride():
        grad_out, out = grad_out.clone(memory_format=torch.contiguous_format), out.clone()
    tiny = 1e-30  # far below any gradient that matters, far above the smallest normal float
    columns = [grad_out.data[..., 0], out.data[..., 0]]  # .data: no version is bumped
    before = [column.clone() for column in columns]
    first = before[0].to(shift.dtype)
    first.masked_fill_((first.abs() < tiny) & (shift != 0), tiny)
    try:
        columns[0].copy_(first)
        columns[1].add_(torch.where(shift == 0, 0, shift / first))
        yield grad_out, out
    finally:
        for column, values in zip(columns, before, strict=True):
            column.copy_(values)


def _overlap(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _rows(x: Tensor, width: int) -> Tensor:
    """`x` of so many columns, zeros behind its own; each row in one piece, as the kernel reads."""
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None or mask.dtype == query.dtype:
        return mask
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
    return mask.to(query.dtype)


# ----------------------------------------------------------------------------------------- flex


def _flex(query, key, value, null_logit_H, mask, is_causal, scale, softcap) -> Attended:
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

    T, S = query.shape[2], key.shape[2]
    block_mask = None
    if is_causal and T > 1:
        offset = S - T
        block_mask = create_block_mask(
            lambda _b, _h, t, s: s <= t + offset, None, None, T, S, device=query.device
        )
    if mask is not None:
        mask = mask.expand(query.shape[0], query.shape[1], T, S)

    def score_mod(score, b, h, t, s):
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if mask is None:
            return score
        allowed = mask[b, h, t, s]
        return (
            torch.where(allowed, score, -math.inf) if mask.dtype == torch.bool else score + allowed
        )

    out, aux = _compiled_flex(query.is_cuda)(
        query, key, value,
        score_mod=None if softcap is None and mask is None else score_mod,
        block_mask=block_mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    c = null_logit_H[:, None]
    lse = aux.lse.to(c.dtype)
    blind = lse.detach() == -math.inf
    keep = torch.sigmoid(lse - c).masked_fill(blind, 0)
    null = torch.sigmoid(c - lse).masked_fill(blind, 1)
    out = (out * keep.unsqueeze(-1)).to(query.dtype)
    return Attended(out, null, _log_denominator(lse, c).detach())


@cache
def _compiled_flex(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


# --------------------------------------------------------------------------------------- checks


def _with_causal(mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
    causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    if mask is None:
        return causal[None, None]
    if mask.dtype == torch.bool:
        return mask & causal
    return mask.masked_fill(~causal, -math.inf)


def _check_shapes(query, key, value, mask, null_logit) -> None:
    def shapes() -> str:  # not made unless it is shown: this is on the path of decoding
        return f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"

    if not query.dim() == key.dim() == value.dim() == 4:
        raise UserError(f"{shapes()}: each must have four axes [batch, heads, tokens, width]")
    fits = (
        query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1:3] == value.shape[1:3]
        and query.shape[3] == key.shape[3]
        and query.shape[1] % key.shape[1] == 0
    )
    if not fits:
        raise UserError(
            f"{shapes()}: batch, key tokens and width must agree, and query heads be a multiple of"
            " key heads"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise UserError(
            f"key, value: dtypes {key.dtype}, {value.dtype} are not query's {query.dtype}"
        )
    if isinstance(null_logit, Tensor) and null_logit.shape not in ((), (1,), (query.shape[1],)):
        raise UserError(
            f"null_logit: shape {list(null_logit.shape)} is neither [] nor"
            f" [{query.shape[1]}], one per head"
        )
    _check_mask(mask, query, key)


def _check_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    if mask is None:
        return
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    try:
        fits = torch.broadcast_shapes(mask.shape, full) == full
    except RuntimeError:
        fits = False
    if not fits or mask.dim() != 4:
        raise UserError(f"attn_mask: shape {list(mask.shape)} does not broadcast to {list(full)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise UserError(f"attn_mask: dtype {mask.dtype} is neither boolean nor floating point")


def _choose(backend, query, key, value, mask, softcap, dropout) -> str:
    check_choice("backend", backend, BACKENDS)
    fused = "flex" if query.is_cuda else "cpu_flash"
    wanted = fused if backend == "auto" else backend
    reason = _refusal(wanted, query, key, value, mask, softcap, dropout)
    if not reason:
        return wanted
    if backend == "auto":
        warnings.warn(
            f"null_attention falls back to 'naive', which stores the map: {reason}", stacklevel=4
        )
        return "naive"
    raise UserError(f"backend: {backend!r} cannot serve this call: {reason}; use 'naive' or 'auto'")


def _refusal(backend, query, key, value, mask, softcap, dropout) -> str | None:
    """Why this backend cannot serve the call, or None."""
    if backend == "naive":
        return None
    if dropout:
        return f"dropout {dropout} on attention weights needs the weights"
    if mask is not None and mask.requires_grad:
        return "attn_mask needs a gradient"
    if query.shape[2] == 0 or key.shape[2] == 0:
        return "there are no tokens"
    if backend == "cpu_flash":
        if query.device.type != "cpu":
            return f"it runs on the CPU, the tensors are on {query.device.type!r}"
        if query.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            return f"dtype {query.dtype} is none of float32, float64, bfloat16"
        if softcap is not None:
            return f"softcap {softcap} is not in the kernel"
    elif not query.is_cuda and torch.is_grad_enabled():
        wants_gradient = query.requires_grad or key.requires_grad or value.requires_grad
        return "on the CPU it has no backward" if wants_gradient else None
    return None
