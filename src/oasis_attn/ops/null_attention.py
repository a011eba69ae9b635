"""Token attention with a null option, at the price of plain attention (OASIS arXiv 2605.17887).

    p_j = exp(s_j) / (exp(c) + sum_i exp(s_i))        null = exp(c) / (exp(c) + sum_i exp(s_i))

The null is a key of value zero, so nothing but the denominator changes.  A fused softmax kernel
that returns its log-sum-exp `lse` therefore gives both results without a T x T map:

    out = sigmoid(lse - c) * out_softmax              null = sigmoid(c - lse)

and its backward, which recomputes p = exp(s - lse), computes the null form's own gradients when it
is handed `lse' = logaddexp(lse, c)` and the finished `out`.  See `cpu_flash.py`.

Axes: B batch, H query heads, G key heads (H a multiple of G), T queries, S keys, d head width.
"""

from __future__ import annotations

import sys
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from oasis_attn.errors import UserError, check_choice
from oasis_attn.ops import native
from oasis_attn.ops.cpu_flash import CpuFlash, flash, rows
from oasis_attn.ops.cuda_flash import cuda_flash
from oasis_attn.ops.flex import flex
from oasis_attn.ops.naive_attention import four_axes, naive_mix, naive_weights, with_causal

__all__ = [
    "Attended",
    "attend",
    "attend_one",
    "attends_one",
    "naive_mix",
    "naive_weights",
    "null_attention",
]

BACKENDS = ("auto", "naive", "cpu_flash", "cuda_flash", "flex")


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
        attn_mask: broadcastable to `[B, H, T, S]`; boolean (True: may attend), or additive.  With
            the null off, hide keys by False or -inf: rows whose logits are all beyond 4096 in size
            take the plain form's gradients, with a warning.
        is_causal: query t sees keys up to t + S - T: the last query sees all keys, as in decoding
            from a cache.  (PyTorch aligns the first query with the first key instead.)
        scale: of the logits; default `d ** -0.5`.
        null_logit: c, a number or a tensor `[H]`; 0 is Softmax1, `-inf` is softmax, and with `inf`
            all mass is on the null.
        softcap: logits become `softcap * tanh(logits / softcap)` before masking.
        dropout: probability of dropping an attention weight; `naive` only.  The null mass is kept.
        backend: `naive` (plain PyTorch, stores `[B, H, T, S]`, float32 inside), `cpu_flash` (CPU),
            `cuda_flash` (CUDA: the kernel that `scaled_dot_product_attention` chooses), `flex`
            (CUDA, with a softcap too; forward only on the CPU), or `auto`: the first of the
            device's fused ones that can serve the call, else `naive`.

    Returns:
        `out_BHTd` in the dtype of `query`, and `null_BHT`, the null mass in [0, 1], in float32 (in
        float64 for float64 inputs).  Both are differentiable in query, key, value and null_logit.
        A query that may see no key has out 0 and null 1.  Only `naive` has second derivatives; the
        others raise `UserError` when one is asked for.

    Raises:
        UserError: on shapes, dtypes or numbers that do not fit, or when the named backend cannot
            serve the call.
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
    _check_shapes(query, key, value)
    _check_numbers(scale, softcap, dropout)
    attn_mask = four_axes(attn_mask, query, key)
    null_logit_H = _null_logits(null_logit, query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(scale, int):  # which the kernels take up to 64 bits only
        scale = float(scale)
    T, S = query.shape[2], key.shape[2]
    if T == 1:
        is_causal = False  # bottom-right alignment: the only query sees all
    call = Call(query, key, value, attn_mask, is_causal, scale, softcap, dropout)
    backend = _choose(backend, call)
    plain = attn_mask is None and T == S and scale > 0  # the kernels scale the -inf they hide by
    if is_causal and backend != "flex" and (backend == "naive" or not plain):
        attn_mask, is_causal = with_causal(attn_mask, T, S, query.device), False
    if backend == "cpu_flash":
        width, own = max(query.shape[-1], value.shape[-1]), value.shape[-1]
        query, key, value = (rows(x, width) for x in (query, key, value))
        arguments = (query, key, value, null_logit_H, attn_mask, is_causal, scale)
        out_BHTd, null_BHT, total_BHT = CpuFlash.apply(*arguments)  # type: ignore[no-untyped-call]
        return Attended(out_BHTd[..., :own] if own < width else out_BHTd, null_BHT, total_BHT)
    if backend == "cuda_flash":
        return Attended(*cuda_flash(query, key, value, null_logit_H, attn_mask, is_causal, scale))
    if backend == "flex":
        return Attended(
            *flex(query, key, value, null_logit_H, attn_mask, is_causal, scale, softcap)
        )
    weights_BHTS, null_BHT, total_BHT = naive_weights(
        query, key, attn_mask=attn_mask, scale=scale, softcap=softcap, null_logit=null_logit_H
    )
    return Attended(naive_mix(weights_BHTS, value, dropout).to(query.dtype), null_BHT, total_BHT)


def attend_one(
    query_BH1d: Tensor, key: Tensor, value: Tensor, *, scale: float, null_logit: float | Tensor
) -> tuple[Tensor, Tensor]:
    """`null_attention` of one new token a sequence that sees all keys, where `attends_one`."""
    width = query_BH1d.shape[-1]
    query_BH1d, key, value = (rows(x, width) for x in (query_BH1d, key, value))
    out, lse_BH1 = flash(query_BH1d, key, value, 0.0, False, scale=scale)
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


# --------------------------------------------------------------------------------------- checks


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    def shapes() -> str:  # not made unless it is shown: this is on the path of decoding
        return f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"

    if not query.dim() == key.dim() == value.dim() == 4:
        raise UserError(f"{shapes()}: each must have four axes [batch, heads, tokens, width]")
    if query.shape[1] * query.shape[3] * key.shape[1] == 0:
        raise UserError(f"{shapes()}: there must be at least one head, of width at least 1")
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
    if not query.is_floating_point():
        raise UserError(f"query: dtype {query.dtype} is not floating point")
    if not query.dtype == key.dtype == value.dtype:
        raise UserError(
            f"key, value: dtypes {key.dtype}, {value.dtype} are not query's {query.dtype}"
        )


def _check_numbers(scale: float | None, softcap: float | None, dropout: float) -> None:
    if scale is not None and not _is_finite(scale):
        raise UserError(f"scale: {scale!r} is not a finite number (int or float)")
    if softcap is not None and not (_is_finite(softcap) and softcap > 0):
        raise UserError(f"softcap: {softcap!r} is not a finite number above 0")
    if not (_is_finite(dropout) and 0 <= dropout <= 1):
        raise UserError(f"dropout: {dropout!r} is not a probability from 0 to 1")


def _is_finite(value: object) -> bool:
    # Compared, for torch.compile cannot trace math.isfinite of a number that it keeps symbolic.
    largest = sys.float_info.max
    return isinstance(value, (int, float)) and -largest <= value <= largest


def _null_logits(null_logit: float | Tensor, query: Tensor) -> Tensor:
    """c as `[1]` or `[H]`, in the precision of the logits."""
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads = query.shape[1]
    if not isinstance(null_logit, Tensor):
        try:
            if isinstance(null_logit, int | float):  # a copy to CUDA would wait for its queue
                logits = torch.full((), null_logit, dtype=precise, device=query.device)
            else:
                logits = torch.as_tensor(null_logit, dtype=precise, device=query.device)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise UserError(
                f"null_logit: {null_logit!r} is neither a number nor a tensor of {heads}, one per"
                " head"
            ) from None
        if isinstance(null_logit, float) and null_logit != null_logit:
            raise UserError("null_logit: nan is not a number; -inf switches the null off")
    elif null_logit.is_complex():
        raise UserError(f"null_logit: dtype {null_logit.dtype} is not real")
    else:
        logits = null_logit.to(precise).to(query.device)
    if logits.shape not in ((), (1,), (heads,)):
        raise UserError(
            f"null_logit: shape {list(logits.shape)} is neither [] nor [{heads}], one per head"
        )
    return logits.reshape(-1)


class Call(NamedTuple):
    """What decides which backend can serve a call."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float
    softcap: float | None
    dropout: float


def _choose(backend: str, call: Call) -> str:
    check_choice("backend", backend, BACKENDS)
    query, key = call.query, call.key
    if 0 in (query.shape[0], query.shape[2], key.shape[2]):
        return "naive"  # there is no map to store, and the kernels want tokens
    fused = ("cuda_flash", "flex") if query.is_cuda else ("cpu_flash",)
    reason: str | None = None
    for wanted in fused if backend == "auto" else (backend,):
        if wanted == "flex" and backend == "auto" and query.shape[2] == 1:
            return "naive"  # its map is one row, and flex would compile for more and more keys
        reason = _refusal(wanted, call)
        if not reason:
            return wanted
    if backend == "auto":
        warnings.warn(
            f"null_attention falls back to 'naive', which stores the map: {reason}", stacklevel=4
        )
        return "naive"
    raise UserError(f"backend: {backend!r} cannot serve this call: {reason}; use 'naive' or 'auto'")


def _refusal(backend: str, call: Call) -> str | None:
    """Why this backend cannot serve the call, or None."""
    if backend == "naive":
        return None
    if call.dropout:
        return f"dropout {call.dropout} on attention weights needs the weights"
    if call.mask is not None and call.mask.requires_grad:
        return "attn_mask needs a gradient"
    return {"cpu_flash": _not_cpu_flash, "cuda_flash": _not_cuda_flash, "flex": _not_flex}[backend](
        call
    )


def _not_cpu_flash(call: Call) -> str | None:
    query = call.query
    if query.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {query.device.type!r}"
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return f"dtype {query.dtype} is none of float32, float64, bfloat16"
    return None if call.softcap is None else f"softcap {call.softcap} is not in the kernel"


def _not_cuda_flash(call: Call) -> str | None:
    query, mask = call.query, call.mask
    if not query.is_cuda:
        return f"it runs on CUDA, the tensors are on {query.device.type!r}"
    if query.dtype == torch.float16:
        if torch.is_grad_enabled() and _wants_gradient(call):
            return "its gradients need a wider range than float16 has"
    elif query.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {query.dtype} is none of float32, bfloat16, float16"
    if call.scale <= 0:
        return f"scale {call.scale} is not above 0"
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        return f"the kernels would round the mask from {mask.dtype} to {query.dtype}"
    return None if call.softcap is None else f"softcap {call.softcap} is not in the kernels"


def _wants_gradient(call: Call) -> bool:
    return call.query.requires_grad or call.key.requires_grad or call.value.requires_grad


def _not_flex(call: Call) -> str | None:
    if not call.query.is_cuda:
        backward = torch.is_grad_enabled() and _wants_gradient(call)
        return "on the CPU it has no backward" if backward else None
    return "its kernel has no float64" if call.query.dtype == torch.float64 else None
