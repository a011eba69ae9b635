"""Attention with a null option by PyTorch's CPU flash attention, forward and backward.

The package docstring has the identities.  Axes: B batch, H heads, T queries, S keys, d head width.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oasis_attn.ops.autograd import HandWritten, first_order
from oasis_attn.ops.null_attention.naive import (
    add_causal_mask,
    lse_with_null,
    naive_attention,
)
from oasis_attn.ops.null_attention.null import Null, null_gradients
from oasis_attn.ops.torch_compat import (
    dispatch_modes,
    flash_attention_for_cpu,
    flash_attention_for_cpu_backward,
)

_LARGEST_LSE = 4096.0
"""Above it, float32 rounds the log-sum-exp so coarsely that exp(s - lse) does not sum to one."""


class CpuFlash(HandWritten):
    """Maps `(query, key, value, *Null, mask, is_causal, scale)` to out, null and lse.

    query, key and values have the same width and contiguous rows; mask has four axes.  lse is the
    log-sum-exp over the keys and the null.
    """

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        null_logit: Tensor,
        null_value: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        additive = _additive(mask, query)
        out, lse = flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=additive, scale=scale
        )
        if additive is not None:  # for a fully masked row the kernel returns lse 0, not -inf
            fully_masked = additive.amax(-1) == -math.inf
            lse = lse.masked_fill(fully_masked, -math.inf)
        excess = lse - null_logit
        keep, null = torch.sigmoid(excess), torch.sigmoid(-excess)
        if additive is not None:  # set, because c = -inf gives NaN above
            keep, null = keep.masked_fill(fully_masked, 0), null.masked_fill(fully_masked, 1)
        keep = keep.unsqueeze(-1)
        # A dispatch mode (selective checkpointing) may keep the kernel's out.
        observed = not torch.compiler.is_compiling() and dispatch_modes()
        out = out * keep if observed else out.mul_(keep)
        if null_value is not None:
            out = torch.addcmul(out.to(null.dtype), null.unsqueeze(-1), null_value).to(out.dtype)
        return out, null, lse_with_null(lse, null_logit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.is_causal, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_null: Tensor | None, _grad_lse: None
    ) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_null is None:
            return (None,) * 8
        with_null = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        gradients = partial(_gradients, ctx.is_causal, ctx.scale, with_null)
        return *first_order(gradients, grad_out, grad_null, *ctx.saved_tensors), None, None, None


def _gradients(
    is_causal: bool,
    scale: float,
    with_null: bool,
    grad_out: Tensor | None,
    grad_null: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_logit: Tensor,
    null_value: Tensor | None,
    mask: Tensor | None,
    *output: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, and of the null's logit and value.

    The kernel's backward computes dS = P * (dP - delta), with P = exp(s - lse) and
    delta = rowsum(dOut * Out).  With lse' = logaddexp(lse, c) for lse, P is p of attention with the
    null, and with its Out all three gradients are correct.  A gradient of null adds
    -p_j * null * dNull to dS_j, that is, null * dNull to delta.
    """
    out, null, lse = output
    if not torch.compiler.is_compiling():  # tracing cannot branch on values
        coarse = (lse.abs() > _LARGEST_LSE) & (null < 1)
        if coarse.any():
            inputs = query, key, value, null_logit, null_value
            return _naive_gradients(is_causal, scale, grad_out, grad_null, inputs, mask)
    only_null = grad_out is None
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grad_logit = grad_value_of_null = None
    if with_null:
        delta = (grad_out * out).sum(-1, dtype=null.dtype)
        grad_logit, grad_value_of_null = null_gradients(
            Null(null_logit, null_value), null, delta, grad_out, grad_null
        )
    arguments = (grad_out, query, key, value, out, lse)
    if grad_null is None:
        grads = flash_attention_for_cpu_backward(
            *arguments, 0.0, is_causal, attn_mask=_additive(mask, query), scale=scale
        )
    else:
        grads = _shifted_backward(*arguments, null * grad_null, is_causal, mask, scale)
    grad_query, grad_key, grad_value = grads
    grad_value = None if only_null else grad_value
    return grad_query, grad_key, grad_value, grad_logit, grad_value_of_null


def _shifted_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    shift: Tensor,
    is_causal: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """The kernel's gradients with delta + shift in place of delta, one half of the batch at a time.

    The kernel has no argument for delta, so `_delta_shifted` passes it a modified copy of `out`.
    Processing halves keeps peak memory at that of the kernel alone, because the operating system
    allocates the pages of the result only when they are written.
    """

    def gradients(part: slice = slice(None)) -> tuple[Tensor, ...]:
        grad_out_part, out_part = _delta_shifted(grad_out[part], out[part], shift[part])
        mask_part = mask if mask is None or mask.shape[0] == 1 else mask[part]
        results: tuple[Tensor, ...] = flash_attention_for_cpu_backward(
            *(grad_out_part, query[part], key[part], value[part], out_part, lse[part]),
            *(0.0, is_causal),
            attn_mask=_additive(mask_part, query),
            scale=scale,
        )
        return results

    def gather(part: slice) -> None:
        halves = list(gradients(part))
        for whole in reversed(grads):
            whole[part].copy_(halves.pop())  # pop, so that its memory is freed

    if not _worth_halving(query):
        return gradients()
    grads = tuple(_empty_like(x) for x in (query, key, value))
    middle = query.shape[0] // 2
    gather(slice(None, middle))
    gather(slice(middle, None))
    return grads


def _empty_like(x_BHTd: Tensor) -> Tensor:
    """An uninitialized tensor with the memory layout [B, T, H, d], as the kernel allocates it."""
    B, H, T, d = x_BHTd.shape
    return x_BHTd.new_empty(B, T, H, d).transpose(1, 2)


def _worth_halving(query: Tensor) -> bool:
    """Whether each half of the batch has at least a megabyte, and at least one head per thread."""
    batch, heads = query.shape[:2]
    return (
        not torch.compiler.is_compiling()
        and batch > 1
        and query.numel() >= 2**19
        and batch // 2 * heads >= torch.get_num_threads()
    )


def _delta_shifted(grad_out: Tensor, out: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """`grad_out`, and a copy of `out` for which rowsum(grad_out * out) is larger by `shift`.

    The kernel uses `out` only for that sum: adding sign(dOut) * x to Out adds x * |dOut|_1 to it.
    If a row of `grad_out` is too small for a finite x, one entry of a copy of it is set to 2^-100
    times the shift.
    """
    size = grad_out.abs().sum(-1, dtype=shift.dtype)
    least = (shift.abs() * 2.0**-100).clamp(min=torch.finfo(shift.dtype).tiny)
    small = (size < least) & (shift != 0)
    if torch.compiler.is_compiling() or small.any():
        grad_out = grad_out.clone()
        first = grad_out[..., 0]
        first.copy_(torch.where(small, least, first))
        size = grad_out.abs().sum(-1, dtype=shift.dtype)
    rise = torch.where(shift == 0, 0, shift / size).to(out.dtype)
    return grad_out, torch.addcmul(out, grad_out.sign(), rise.unsqueeze(-1))


def _naive_gradients(
    is_causal: bool,
    scale: float,
    grad_out: Tensor | None,
    grad_null: Tensor | None,
    inputs: tuple[Any, ...],
    mask: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The same gradients computed by `naive`, which does not use the log-sum-exp."""
    warnings.warn(
        "null_attention computes this gradient by 'naive', which stores the attention matrix: for"
        f" logits beyond {_LARGEST_LSE:.0f} the kernel's log-sum-exp is not accurate enough; to"
        " avoid this, use a boolean mask, or -inf instead of large negative numbers",
        stacklevel=2,
    )
    leaves: list[Any] = [x if x is None else x.detach().requires_grad_() for x in inputs]
    query, key, value, null_logit, null_value = leaves
    if is_causal:
        mask = add_causal_mask(None, query.shape[2], key.shape[2], query.device)
    with torch.enable_grad():
        outputs = naive_attention(
            query, key, value, Null(null_logit, null_value), mask=mask, scale=scale
        )
    pairs = zip(outputs[:2], (grad_out, grad_null), strict=True)
    results, upstream = zip(*(pair for pair in pairs if pair[1] is not None), strict=True)
    given = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad(results, given, upstream, allow_unused=True))
    return tuple(None if x is None else next(found) for x in leaves)


def pad_head_width(x: Tensor, width: int) -> Tensor:
    """Pad the last axis of `x` with zeros to `width`; rows are contiguous, as the kernel needs."""
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """`mask` as the kernel reads it: additive, in the dtype of `query`, or float32 for bfloat16.

    The kernel does not check the dtype: it would read a float32 mask of float64 queries as float64.
    """
    if mask is None or mask.dtype == query.dtype:
        return mask
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
    return mask.to(torch.promote_types(query.dtype, torch.float32))
