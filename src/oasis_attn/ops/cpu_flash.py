"""PyTorch's CPU flash attention, forward and backward, with the null in the denominator.

See `null_attention.py` for the identities.  Axes: B batch, H heads, T queries, S keys, d width.
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
from oasis_attn.ops.naive_attention import log_denominator, naive_mix, naive_weights, with_causal

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

_LARGEST_LSE = 4096.0
"""Beyond it float32 rounds a log-sum-exp so coarsely that exp(s - lse) no longer sums to one."""


class CpuFlash(HandWritten):
    """`(query, key, value, null_logit_H, mask, is_causal, scale)` to out, null, log-denominator.

    The three tensors have rows in one piece and one width, the mask four axes.
    """

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
        c = null_logit_H[:, None]
        additive = _additive(mask, query)
        out, lse = flash(query, key, value, 0.0, is_causal, attn_mask=additive, scale=scale)
        if additive is not None:  # the kernel reports lse 0, not -inf, where nothing may be seen
            blind = additive.amax(-1) == -math.inf
            lse = lse.masked_fill(blind, -math.inf)
        excess = lse - c
        keep, null = torch.sigmoid(excess), torch.sigmoid(-excess)
        if additive is not None:  # also where c is -inf
            keep, null = keep.masked_fill(blind, 0), null.masked_fill(blind, 1)
        return out.mul_(keep.unsqueeze(-1)), null, log_denominator(lse, c)

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
    null_logit_H: Tensor,
    mask: Tensor | None,
    *output: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value and null_logit_H.

    Flash backward: dS = P * (dP - delta), P = exp(s - lse), delta = rowsum(dOut * Out).  With lse'
    for lse, P is the null form's p, and with its Out all three gradients are its own.  A gradient
    on null adds -p_j * null * dNull to dS_j, that is, null * dNull to delta.
    """
    out, null, total = output
    if not torch.compiler.is_compiling():  # which cannot look at values
        coarse = (total.abs() > _LARGEST_LSE) & (null < 1)
        if coarse.any():
            inputs = query, key, value, null_logit_H
            return _naive_gradients(is_causal, scale, grad_out, grad_null, inputs, mask)
    null_alone = grad_out is None
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grad_c = None
    if with_c:
        delta = (grad_out * out).sum(-1, dtype=null.dtype)
        grad_c = -null * delta
        if grad_null is not None:
            grad_c = grad_c + grad_null * null * (1 - null)
        grad_c = grad_c.sum((0, 2))
    arguments = (grad_out, query, key, value, out, total)
    if grad_null is None:
        grads = _flash_backward(
            *arguments, 0.0, is_causal, attn_mask=_additive(mask, query), scale=scale
        )
    else:
        grads = _shifted_backward(*arguments, null * grad_null, is_causal, mask, scale)
    grad_query, grad_key, grad_value = grads
    return grad_query, grad_key, None if null_alone else grad_value, grad_c


def _shifted_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    total: Tensor,
    shift: Tensor,
    is_causal: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """The kernel's gradients with delta + shift for delta, half of the batch at a time.

    The kernel has no argument for delta, so `_delta_shifted` copies `out`.  By halves this needs
    no more memory than the kernel itself, for the system backs the gathered gradients with memory
    only once they are written.
    """

    def gradients(part: slice = slice(None)) -> tuple[Tensor, ...]:
        grad_out_part, out_part = _delta_shifted(grad_out[part], out[part], shift[part])
        mask_part = mask if mask is None or mask.shape[0] == 1 else mask[part]
        results: tuple[Tensor, ...] = _flash_backward(
            *(grad_out_part, query[part], key[part], value[part], out_part, total[part]),
            *(0.0, is_causal),
            attn_mask=_additive(mask_part, query),
            scale=scale,
        )
        return results

    def gather(part: slice) -> None:
        halves = list(gradients(part))
        for whole in reversed(grads):
            whole[part].copy_(halves.pop())  # and free it

    if not _worth_halving(query):
        return gradients()
    grads = tuple(_empty_like(x) for x in (query, key, value))
    middle = query.shape[0] // 2
    gather(slice(None, middle))
    gather(slice(middle, None))
    return grads


def _empty_like(x_BHTd: Tensor) -> Tensor:
    """Uninitialised, in the order [B, T, H, d] in memory, as the kernel allocates."""
    B, H, T, d = x_BHTd.shape
    return x_BHTd.new_empty(B, T, H, d).transpose(1, 2)


def _worth_halving(query: Tensor) -> bool:
    """Whether each half of the batch is a megabyte or more, and has a head for each thread."""
    batch, heads = query.shape[:2]
    return (
        not torch.compiler.is_compiling()
        and batch > 1
        and query.numel() >= 2**19
        and batch // 2 * heads >= torch.get_num_threads()
    )


def _delta_shifted(grad_out: Tensor, out: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """`grad_out`, and a copy of `out` such that rowsum(grad_out * out) has grown by `shift`.

    The kernel reads `out` for that sum alone: sign(dOut) * x, added to Out, adds x * |dOut|_1.  A
    row of `grad_out` too small for a finite x gets one entry 2^-100 times the shift, in a copy too.
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
    inputs: tuple[Tensor, ...],
    mask: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The same by the plain form, which needs no log-sum-exp."""
    warnings.warn(
        f"null_attention computes this gradient by 'naive', which stores the map: logits beyond"
        f" {_LARGEST_LSE:.0f} leave the kernel's log-sum-exp too coarse; a boolean mask, or -inf"
        " for a large negative number in an additive one, avoids this",
        stacklevel=2,
    )
    if is_causal:
        mask = with_causal(None, inputs[0].shape[2], inputs[1].shape[2], inputs[0].device)
    with torch.enable_grad():
        query, key, value, c = leaves = [x.detach().requires_grad_() for x in inputs]
        weights, null, _ = naive_weights(
            query, key, attn_mask=mask, scale=scale, softcap=None, null_logit=c
        )
        outputs = naive_mix(weights, value).to(query.dtype), null
    pairs = zip(outputs, (grad_out, grad_null), strict=True)
    results, upstream = zip(*(pair for pair in pairs if pair[1] is not None), strict=True)
    return torch.autograd.grad(results, leaves, upstream, allow_unused=True)


def rows(x: Tensor, width: int) -> Tensor:
    """`x` of so many columns, zeros behind its own; each row in one piece, as the kernel reads."""
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """`mask` as the kernel takes it: additive, in float32 or the dtype of `query`."""
    if mask is None or mask.dtype in (query.dtype, torch.float32):
        return mask
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
    return mask.to(torch.float32)
