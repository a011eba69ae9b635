"""Token attention with a null option, at the cost of softmax attention (OASIS, arXiv 2605.17887).

    p_j = exp(s_j) / (exp(c) + sum_i exp(s_i))        null = exp(c) / (exp(c) + sum_i exp(s_i))

The null acts as one more key whose value is zero, so only the denominator changes.  A fused softmax
kernel that returns its log-sum-exp `lse` therefore gives both results without a T x T matrix:

    out = sigmoid(lse - c) * out_softmax              null = sigmoid(c - lse)

The null can also have a key and a value, both learned: c is then a dot product with the query, and
`null * null_value` is added to the output.

The kernel's backward recomputes p = exp(s - lse).  If it receives `lse' = logaddexp(lse, c)` and
the final `out`, it computes the gradients of attention with the null.  See `cpu_flash.py`.

Axes: B batch, H query heads, G key heads (H a multiple of G), T queries, S keys, d head width.
"""

from __future__ import annotations

import sys
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from oasis_attn.errors import UserError, check_choice
from oasis_attn.ops.compiled import c_library
from oasis_attn.ops.null_attention.cpu_flash import CpuFlash, pad_head_width
from oasis_attn.ops.null_attention.cuda_flash import cuda_flash
from oasis_attn.ops.null_attention.flex import flex
from oasis_attn.ops.null_attention.naive import (
    add_causal_mask,
    naive_attention,
    naive_mix,
    naive_weights,
    to_four_axes,
)
from oasis_attn.ops.null_attention.null import Null, null_of_call
from oasis_attn.ops.torch_compat import flash_attention_for_cpu

__all__ = [
    "AttentionOutput",
    "Null",
    "attend",
    "can_use_decode_kernel",
    "decode_attention",
    "naive_mix",
    "naive_weights",
    "null_attention",
    "null_of_call",
]

BACKENDS = ("auto", "naive", "cpu_flash", "cuda_flash", "flex")


class AttentionOutput(NamedTuple):
    """The results of one attention call.

    Attributes:
        out_BHTd: the output, in the dtype of the query.
        null_BHT: the null probability, float32 (float64 for float64 inputs).
        lse_BHT: log-sum-exp over the logits of the keys and the null, that is, the log of the
            denominator; dtype as `null_BHT`.  No gradient flows through it.
    """

    out_BHTd: Tensor
    null_BHT: Tensor
    lse_BHT: Tensor


def null_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    null_logit: float | Tensor = 0.0,
    null_key: Tensor | None = None,
    null_value: Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention whose softmax has a null option; also returns the null probability.

    Args:
        query: `[B, H, T, d]`, float32, float64 or bfloat16 (other dtypes: `naive` only).
        key, value: `[B, G, S, d]`; H is a multiple of G (grouped-query attention).
        attn_mask: broadcastable to `[B, H, T, S]`; boolean (True: may attend) or additive.  With
            `null_logit=-inf`, mask keys with False or -inf: if all logits of a row are beyond 4096
            in absolute value, the gradients are computed by `naive`, with a warning.
        is_causal: query t attends to keys up to t + S - T, so that the last query attends to all
            keys, as in decoding with a cache.  (PyTorch aligns the first query with the first key.)
        scale: factor on the logits; default `d ** -0.5`.
        null_logit: c, a number or a tensor `[H]`.  0 is Softmax1, `-inf` is softmax; with `inf` the
            null probability is 1.
        null_key: keys of M nulls, `[H, M, d]` or `[G, M, d]`.  The logit of null m is then
            `scale * query . null_key[m] + c`, and the null probability is the sum over the nulls.
            The keys have no position: rotary embeddings do not apply to them.
        null_value: values of the nulls, `[H, M, d_v]` or `[G, M, d_v]` (M = 1 without `null_key`),
            which the nulls add to the output; default zero.
        softcap: replaces the logits by `softcap * tanh(logits / softcap)` before masking, those of
            null keys too, before c is added.
        dropout: probability of dropping an attention weight; `naive` only.  The value of the null
            is dropped too, with one draw for all nulls of a query; the null probability is not.
        backend: `naive` (plain PyTorch, stores `[B, H, T, S]`, computes in float32), `cpu_flash`
            (CPU), `cuda_flash` (CUDA: the kernel that `scaled_dot_product_attention` selects),
            `flex` (CUDA, also with a softcap; on the CPU forward only), or `auto`: the first fused
            backend of the device that supports the call, else `naive`.

    Returns:
        `out_BHTd` in the dtype of `query`, and `null_BHT`, the null probability, in float32
        (float64 for float64 inputs).  Both are differentiable in query, key, value and the tensors
        of the null.  A query that can attend to no key has null 1, and its out is the value of the
        null.  Only `naive` supports second derivatives; the other backends raise `UserError` if one
        is requested.

    Raises:
        UserError: shapes, dtypes or numbers are invalid, or the named backend does not support the
            call.
    """
    attended = attend(
        query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale,
        null_logit=null_logit, null_key=null_key, null_value=null_value, softcap=softcap,
        dropout=dropout, backend=backend,
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
    null_key: Tensor | None = None,
    null_value: Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> AttentionOutput:
    """`null_attention` that also returns the log-sum-exp, from which any p_j can be recomputed."""
    _check_shapes(query, key, value)
    _check_numbers(scale, softcap, dropout)
    attn_mask = to_four_axes(attn_mask, query, key)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(scale, int):  # the kernels accept only integers of up to 64 bits
        scale = float(scale)
    null = null_of_call(
        query, key.shape[1], scale=scale, softcap=softcap, null_logit=null_logit, null_key=null_key,
        null_value=null_value,
    )  # fmt: skip
    if null.value_BHTd is not None and null.value_BHTd.shape[-1] != value.shape[-1]:
        raise UserError(
            f"null_value: width {null.value_BHTd.shape[-1]} is not the value's, {value.shape[-1]}"
        )
    T, S = query.shape[2], key.shape[2]
    if T == 1:
        is_causal = False  # bottom-right alignment: the only query attends to all keys
    call = Call(query, key, value, attn_mask, is_causal, scale, softcap, dropout)
    backend = _choose(backend, call)
    # With scale <= 0 the kernels' own causal mask is wrong: they scale its -inf too.
    kernel_is_causal = attn_mask is None and T == S and scale > 0
    if is_causal and backend != "flex" and (backend == "naive" or not kernel_is_causal):
        attn_mask, is_causal = add_causal_mask(attn_mask, T, S, query.device), False
    if backend == "cpu_flash":
        width, value_width = max(query.shape[-1], value.shape[-1]), value.shape[-1]
        query, key, value = (pad_head_width(x, width) for x in (query, key, value))
        null_value = None if null.value_BHTd is None else pad_head_width(null.value_BHTd, width)
        arguments = query, key, value, null.logit_BHT, null_value, attn_mask, is_causal, scale
        out_BHTd, null_BHT, lse_BHT = CpuFlash.apply(*arguments)  # type: ignore[no-untyped-call]
        if value_width < width:
            out_BHTd = out_BHTd[..., :value_width]
        return AttentionOutput(out_BHTd, null_BHT, lse_BHT)
    if backend == "cuda_flash":
        return AttentionOutput(*cuda_flash(query, key, value, null, attn_mask, is_causal, scale))
    if backend == "flex":
        return AttentionOutput(*flex(query, key, value, null, attn_mask, is_causal, scale, softcap))
    return AttentionOutput(
        *naive_attention(
            query, key, value, null, mask=attn_mask, scale=scale, softcap=softcap, dropout=dropout
        )
    )


def decode_attention(
    query_BH1d: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    null_logit: float | Tensor,
    null_key: Tensor | None = None,
    null_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`null_attention` for one new token per sequence that attends to all keys.

    Call it only if `can_use_decode_kernel` returns True.
    """
    null = None
    if null_key is not None or null_value is not None:
        null = null_of_call(
            query_BH1d, key.shape[1], scale=scale, null_logit=null_logit, null_key=null_key,
            null_value=null_value,
        )  # fmt: skip
        null_logit = null.logit_BHT
    width = query_BH1d.shape[-1]
    query_BH1d, key, value = (pad_head_width(x, width) for x in (query_BH1d, key, value))
    out, lse_BH1 = flash_attention_for_cpu(query_BH1d, key, value, 0.0, False, scale=scale)
    null_BH1 = torch.empty_like(lse_BH1)
    logits, count, logit = None, 1, 0.0
    if isinstance(null_logit, Tensor):
        null_logit = null_logit.to(torch.float32).contiguous()
        logits, count = null_logit.data_ptr(), null_logit.numel()
    else:
        logit = null_logit
    B, H, _, d = query_BH1d.shape
    step = c_library().null_step  # type: ignore[union-attr]
    pointers = out.data_ptr(), lse_BH1.data_ptr(), null_BH1.data_ptr(), logits
    step(*pointers, count, logit, B * H, d)
    if null is not None and null.value_BHTd is not None:
        out.addcmul_(null_BH1.unsqueeze(-1), null.value_BHTd)
    return out, null_BH1


def can_use_decode_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether `decode_attention` supports the call: float32 on the CPU, no gradient, no tracing."""
    return (
        query.shape[2] == 1
        and query.dtype == value.dtype == torch.float32
        and query.device.type == "cpu"
        and query.shape[3] == value.shape[3]
        and not torch.is_grad_enabled()
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and c_library() is not None
    )


# --------------------------------------------------------------------------------------- checks


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    def shapes() -> str:  # built only for an error message: decoding runs this check every token
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
            f"{shapes()}: batch sizes, key tokens and widths must be equal, and the number of query"
            " heads must be a multiple of the number of key heads"
        )
    if not query.is_floating_point():
        raise UserError(f"query: dtype {query.dtype} is not floating point")
    if not query.dtype == key.dtype == value.dtype:
        raise UserError(
            f"key, value: dtypes {key.dtype}, {value.dtype} differ from the query's {query.dtype}"
        )


def _check_numbers(scale: float | None, softcap: float | None, dropout: float) -> None:
    if scale is not None and not _is_finite(scale):
        raise UserError(f"scale: {scale!r} is not a finite number (int or float)")
    if softcap is not None and not (_is_finite(softcap) and softcap > 0):
        raise UserError(f"softcap: {softcap!r} is not a finite number above 0")
    if not (_is_finite(dropout) and 0 <= dropout <= 1):
        raise UserError(f"dropout: {dropout!r} is not a probability from 0 to 1")


def _is_finite(value: object) -> bool:
    # Not math.isfinite: torch.compile cannot trace it for a symbolic number.
    largest = sys.float_info.max
    return isinstance(value, (int, float)) and -largest <= value <= largest


class Call(NamedTuple):
    """The arguments that determine which backends support a call."""

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
        return "naive"  # the kernels do not support empty axes, and no matrix is stored here
    fused = ("cuda_flash", "flex") if query.is_cuda else ("cpu_flash",)
    reason: str | None = None
    for chosen in fused if backend == "auto" else (backend,):
        if chosen == "flex" and backend == "auto" and query.shape[2] == 1:
            return "naive"  # its matrix is one row; flex would recompile for each number of keys
        reason = _unsupported(chosen, call)
        if not reason:
            return chosen
    if backend == "auto":
        warnings.warn(
            f"null_attention falls back to 'naive', which needs more memory: {reason}",
            stacklevel=4,
        )
        return "naive"
    raise UserError(
        f"backend: {backend!r} does not support this call: {reason}; use 'naive' or 'auto'"
    )


def _unsupported(backend: str, call: Call) -> str | None:
    """Why the backend does not support the call; None if it does."""
    if backend == "naive":
        return None
    if call.dropout:
        return f"dropout {call.dropout} on attention weights requires the attention matrix"
    if call.mask is not None and call.mask.requires_grad:
        return "attn_mask requires a gradient"
    return {"cpu_flash": _not_cpu_flash, "cuda_flash": _not_cuda_flash, "flex": _not_flex}[backend](
        call
    )


def _not_cpu_flash(call: Call) -> str | None:
    query = call.query
    if query.device.type != "cpu":
        return f"it runs on the CPU, but the tensors are on {query.device.type!r}"
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return f"dtype {query.dtype} is not float32, float64 or bfloat16"
    return None if call.softcap is None else f"the kernel has no softcap (softcap={call.softcap})"


def _not_cuda_flash(call: Call) -> str | None:
    query, mask = call.query, call.mask
    if not query.is_cuda:
        return f"it runs on CUDA, but the tensors are on {query.device.type!r}"
    if query.dtype == torch.float16:
        if torch.is_grad_enabled() and _requires_gradient(call):
            return "the range of float16 is too small for its gradients"
    elif query.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {query.dtype} is not float32, bfloat16 or float16"
    if call.scale <= 0:
        return f"scale {call.scale} is not above 0"
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        return f"the kernels would round the mask from {mask.dtype} to {query.dtype}"
    return None if call.softcap is None else f"the kernels have no softcap (softcap={call.softcap})"


def _requires_gradient(call: Call) -> bool:
    return call.query.requires_grad or call.key.requires_grad or call.value.requires_grad


def _not_flex(call: Call) -> str | None:
    if not call.query.is_cuda:
        backward = torch.is_grad_enabled() and _requires_gradient(call)
        return "on the CPU it has no backward" if backward else None
    return "its kernel has no float64" if call.query.dtype == torch.float64 else None
