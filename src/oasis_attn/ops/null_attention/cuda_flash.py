"""Attention with a null option by PyTorch's CUDA attention kernels, forward and backward.

These are the kernels that `scaled_dot_product_attention` itself chooses from: flash attention,
memory-efficient attention and cuDNN.  The package docstring has the identities.

Axes: B batch, H query heads, G key heads, T queries, S keys, d head width.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from oasis_attn.ops.autograd import HandWritten, first_order
from oasis_attn.ops.null_attention.cpu_flash import pad_head_width
from oasis_attn.ops.null_attention.naive import lse_with_null
from oasis_attn.ops.torch_compat import (
    cudnn_attention,
    cudnn_attention_backward,
    dispatch_modes,
    efficient_attention,
    efficient_attention_backward,
    flash_attention,
    flash_attention_backward,
    fused_sdp_choice,
)

_ALIGNMENT = 8  # the kernels require head widths and mask rows that are multiples of it
_FLASH, _EFFICIENT, _CUDNN = (
    int(backend.value)
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    )
)
_LARGEST_FLASH_WIDTH = 256


def cuda_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_logit_H: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, null probability, lse over keys and null; `is_causal` needs T = S and no mask."""
    own = value.shape[-1]
    width = -(-max(query.shape[-1], own) // _ALIGNMENT) * _ALIGNMENT
    query, key, value = (pad_head_width(x, width) for x in (query, key, value))
    arguments = query, key, value, null_logit_H, mask, is_causal, scale
    out, null, lse = CudaFlash.apply(*arguments)  # type: ignore[no-untyped-call]
    return out[..., :own] if own < width else out, null, lse


class CudaFlash(HandWritten):
    """`(query, key, value, null_logit_H, mask, is_causal, scale)` to out, null, lse."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        null_logit_H: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        traced = torch.compiler.is_compiling()
        attention = _traced_forward if traced else _forward
        additive = _additive(mask, query)
        out, lse = attention(query, key, value, additive, is_causal, scale)
        c = null_logit_H[:, None]
        if additive is not None:
            fully_masked = additive.amax(-1) == -math.inf
            lse = lse.masked_fill(fully_masked, -math.inf)
        excess = lse - c
        keep, null = torch.sigmoid(excess), torch.sigmoid(-excess)
        keep = keep.unsqueeze(-1)
        # A dispatch mode (selective checkpointing) may keep the kernel's out.
        out = (out * keep).to(out.dtype) if traced or dispatch_modes() else out.mul_(keep)
        if additive is not None:  # set, because c = -inf gives NaN above
            null, out = (
                null.masked_fill(fully_masked, 1),
                out.masked_fill(fully_masked.unsqueeze(-1), 0),
            )
        return out, null, lse_with_null(lse, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        query, key, value, null_logit_H, mask, ctx.is_causal, ctx.scale = inputs
        ctx.save_for_backward(query, key, value, null_logit_H, mask, *output)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_null: Tensor | None, _grad_total: None
    ) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_null is None:
            return (None,) * 7
        gradients = partial(_gradients, ctx.is_causal, ctx.scale, ctx.needs_input_grad[3])
        return *first_order(gradients, grad_out, grad_null, *ctx.saved_tensors), None, None, None


def _gradients(
    is_causal: bool,
    scale: float,
    with_c: bool,
    grad_out: Tensor | None,
    grad_null: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _null_logit_H: Tensor,
    mask: Tensor | None,
    *output: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value and null_logit_H; see `cpu_flash._gradients`."""
    out, null, lse = output
    null_alone = grad_out is None
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grad_c = None
    if with_c or grad_null is not None:
        delta = (grad_out * out.to(null.dtype)).sum(-1)
        if with_c:
            grad_c = -null * delta
            if grad_null is not None:
                grad_c = grad_c + grad_null * null * (1 - null)
            grad_c = grad_c.sum((0, 2))
        if grad_null is not None:
            grad_out, out = _with_delta(grad_out, delta + null * grad_null)
    attention_backward = _traced_backward if torch.compiler.is_compiling() else _backward
    additive = _additive(mask, query)
    grad_query, grad_key, grad_value = attention_backward(
        grad_out, query, key, value, out, lse, additive, is_causal, scale
    )
    return grad_query, grad_key, None if null_alone else grad_value, grad_c


def _with_delta(grad_out: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """`grad_out`, and an `out` such that rowsum(grad_out * out) is `delta`.

    The kernels read `out` for that sum alone.  It is made parallel to `grad_out`, so that half
    precision rounds the sum less than one entry.  A row of `grad_out` too small for that gets one
    entry 2^-100 times the sum.
    """
    largest = torch.linalg.vector_norm(grad_out, torch.inf, -1, dtype=delta.dtype)
    least = (delta.abs() * 2.0**-100).clamp(min=torch.finfo(delta.dtype).tiny)
    small = largest < least
    first = torch.where(small, least.to(grad_out.dtype), grad_out[..., 0])
    grad_out = grad_out.clone()
    grad_out[..., 0] = first
    largest = torch.where(small, least, largest).unsqueeze(-1)
    unit = grad_out / largest
    factor = delta.unsqueeze(-1) / largest / unit.square().sum(-1, keepdim=True)
    return grad_out, (unit * factor).to(grad_out.dtype)


# ------------------------------------------------------------------------------------- kernels


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """`mask` as the kernels take it: additive, in the dtype of `query`, its rows aligned."""
    if mask is None:
        return None
    S = mask.shape[-1]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
    mask, missing = mask.to(query.dtype), -S % _ALIGNMENT
    return F.pad(mask, (0, missing))[..., :S] if missing else mask


def _chosen_kernel(
    query: Tensor, key: Tensor, value: Tensor, additive: Tensor | None, is_causal: bool
) -> int:
    """The kernel that `scaled_dot_product_attention` would choose, if it is a fused one.

    cuDNN plans anew for each number of keys, which takes longer than to decode a token.
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.shape[2] == 1:
        flash = half and additive is None and query.shape[-1] <= _LARGEST_FLASH_WIDTH
        return _FLASH if flash else _EFFICIENT
    if additive is not None:
        additive = additive.expand(query.shape[0], query.shape[1], -1, -1)
    grouped = query.shape[1] != key.shape[1]
    try:
        chosen = fused_sdp_choice(query, key, value, additive, 0.0, is_causal, enable_gqa=grouped)
    except RuntimeError:  # only memory-efficient attention is allowed: it has no groups by itself
        return _EFFICIENT
    return chosen if chosen in (_FLASH, _CUDNN) else _EFFICIENT


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additive: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention, and its log-sum-exp `[B, H, T]`."""
    kernel = _chosen_kernel(query, key, value, additive, is_causal)
    if kernel == _FLASH:
        out, lse, *_ = flash_attention(query, key, value, 0.0, is_causal, scale=scale)
        return out, lse
    full = _expanded(additive, query, key)
    if kernel == _CUDNN:
        out, lse, *_ = cudnn_attention(query, key, value, full, True, 0.0, is_causal, scale=scale)
        return out, lse.squeeze(-1)
    key, value = _by_query_head(key, query), _by_query_head(value, query)
    out, lse, *_ = efficient_attention(query, key, value, full, True, 0.0, is_causal, scale=scale)
    return out, lse[..., : query.shape[2]]


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    additive: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from whichever log-sum-exp and `out` are given."""
    kernel = _chosen_kernel(query, key, value, additive, is_causal)
    unused = torch.empty((2, 1), dtype=torch.int64, device=query.device).unbind()  # of dropout
    full = _expanded(additive, query, key)
    if kernel == _EFFICIENT:
        lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)  # whole vectors
        keys, values = _by_query_head(key, query), _by_query_head(value, query)
        grad_query, *grads, _ = efficient_attention_backward(
            _token_major(grad_out), query, keys, values, full, _token_major(out), lse, *unused,
            0.0, (True, True, True, False), is_causal, scale=scale,
        )  # fmt: skip
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            grads = [x.unflatten(1, (-1, groups)).sum(2) for x in grads]
        return grad_query, *grads
    arguments, lengths = (grad_out, query, key, value, out), (query.shape[2], key.shape[2])
    if kernel == _FLASH:
        grad_query, grad_key, grad_value = flash_attention_backward(
            *arguments, lse, None, None, *lengths, 0.0, is_causal, *unused, scale=scale
        )
    else:
        grad_query, grad_key, grad_value = cudnn_attention_backward(
            *arguments, lse.unsqueeze(-1), *unused, full, None, None, *lengths, 0.0, is_causal,
            scale=scale,
        )  # fmt: skip
    return grad_query, grad_key, grad_value


def _expanded(additive: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if additive is None:
        return None
    return additive.expand(*query.shape[:3], key.shape[2])


def _by_query_head(x_BGSd: Tensor, query: Tensor) -> Tensor:
    groups = query.shape[1] // x_BGSd.shape[1]
    return x_BGSd if groups == 1 else x_BGSd.repeat_interleave(groups, dim=1)


def _token_major(x_BHTd: Tensor) -> Tensor:
    """In the order [B, T, H, d] in memory, as memory-efficient attention reads `out`."""
    return x_BHTd.transpose(1, 2).contiguous().transpose(1, 2)


# --------------------------------------------------------------------------------- torch.compile


@torch.library.custom_op("oasis_attn::cuda_flash", mutates_args=())
def _traced_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additive: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`_forward`, whose choice of a kernel torch.compile cannot trace."""
    out, lse = _forward(query, key, value, additive, is_causal, scale)
    return _token_major(out), lse.contiguous()


@_traced_forward.register_fake
def _(query: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
    return _empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("oasis_attn::cuda_flash_backward", mutates_args=())
def _traced_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    additive: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = grad_out, query, key, value, out, lse, additive, is_causal, scale
    grad_query, grad_key, grad_value = _backward(*arguments)
    return _token_major(grad_query), _token_major(grad_key), _token_major(grad_value)


@_traced_backward.register_fake
def _(
    _grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(query), _empty_like(key), _empty_like(value)


def _empty_like(x_BHTd: Tensor) -> Tensor:
    """Uninitialized, in the order of `_token_major`."""
    B, H, T, d = x_BHTd.shape
    return x_BHTd.new_empty(B, T, H, d).transpose(1, 2)
