"""Triton kernels for alpha and the depth null of one router, from its scores and psi.

    alpha, null = softmax(g + beta (mean psi - psi), 0)         the 0 only for Softmax1

Axes: N tokens, S sources.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oasis_attn.ops.depth_mix.triton_kernels.sums import on_device_of, power_of_2, tiles

_TOKENS = 32  # per program


def weights(
    scores: Tensor, psi: Tensor | None, beta: Tensor | None, with_null: bool
) -> tuple[Tensor, Tensor]:
    """alpha `[..., S]` and the null `[...]`, in the dtype of the scores `[..., S]`."""
    scores, psi = scores.contiguous(), None if psi is None else psi.contiguous()
    S = scores.shape[-1]
    found, null = torch.empty_like(scores), scores.new_empty(scores.shape[:-1])
    N = null.numel()
    with on_device_of(scores):
        _weights_kernel[(tiles(N, _TOKENS),)](
            *(scores, psi, beta, found, null, N, S, with_null, _TOKENS, _block(S))
        )
    return found, null


def weight_gradients(
    grad: Tensor | None,
    grad_null: Tensor | None,
    found: Tensor,
    null: Tensor,
    psi: Tensor | None,
    beta: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of `weights` for the scores, psi and beta, from its results `found`
    and `null`."""
    grad = None if grad is None else grad.contiguous()
    grad_null = None if grad_null is None else grad_null.contiguous()
    N, S = null.numel(), found.shape[-1]
    programs = tiles(N, _TOKENS)
    grad_scores, grad_psi, partial = torch.empty_like(found), None, None
    if psi is not None:
        psi = psi.contiguous()
        grad_psi, partial = torch.empty_like(psi), found.new_empty(programs)
    with on_device_of(found):
        _weight_gradients_kernel[(programs,)](
            *(grad, grad_null, found, null, psi, beta, grad_scores, grad_psi, partial, N, S),
            *(_TOKENS, _block(S)),
        )
    if partial is None or beta is None:
        return grad_scores, None, None
    return grad_scores, grad_psi, partial.sum().to(beta.dtype).view(beta.shape)


def _block(S: int) -> int:
    return max(32, power_of_2(S))  # one compiled kernel for most models


# -------------------------------------------------------------------------------------- kernels


@triton.jit
def _evidence(psi, at, inside, S, wide: tl.constexpr):
    """mean psi - psi"""
    value = tl.load(psi + at, mask=inside, other=0.0).to(wide)
    return tl.where(inside, (tl.sum(value, 1) / S)[:, None] - value, 0.0)


@triton.jit(do_not_specialize=["N", "S"])
def _weights_kernel(
    scores, psi, beta, weights, null, N, S,
    WITH_NULL: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, BLOCK)
    at = rows[:, None] * S + columns[None, :]
    inside = (rows < N)[:, None] & (columns < S)[None, :]
    wide = scores.dtype.element_ty
    logits = tl.load(scores + at, mask=inside, other=0.0)
    if psi is not None:
        logits += tl.load(beta).to(wide) * _evidence(psi, at, inside, S, wide)
    logits = tl.where((columns < S)[None, :], logits, float("-inf"))
    largest = tl.max(logits, 1)
    if WITH_NULL:
        largest = tl.maximum(largest, 0.0)
    exponentials = tl.exp(logits - largest[:, None])
    total = tl.sum(exponentials, 1)
    if WITH_NULL:
        rest = tl.exp(-largest)
        total += rest
        tl.store(null + rows, rest / total, mask=rows < N)
    else:
        tl.store(null + rows, tl.zeros_like(total), mask=rows < N)
    tl.store(weights + at, exponentials / total[:, None], mask=inside)


@triton.jit(do_not_specialize=["N", "S"])
def _weight_gradients_kernel(
    grad, grad_null, weights, null, psi, beta, grad_scores, grad_psi, grad_beta, N, S,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, BLOCK)
    at = rows[:, None] * S + columns[None, :]
    inside = (rows < N)[:, None] & (columns < S)[None, :]
    wide = weights.dtype.element_ty
    weight = tl.load(weights + at, mask=inside, other=0.0)
    upstream = tl.zeros_like(weight)
    if grad is not None:
        upstream = tl.load(grad + at, mask=inside, other=0.0).to(wide)
    inner = tl.sum(weight * upstream, 1)
    if grad_null is not None:
        of_null = tl.load(grad_null + rows, mask=rows < N, other=0.0).to(wide)
        inner += of_null * tl.load(null + rows, mask=rows < N, other=0.0)
    logits = weight * (upstream - inner[:, None])
    tl.store(grad_scores + at, logits, mask=inside)
    if psi is not None:
        evidence = _evidence(psi, at, inside, S, wide)
        tl.store(grad_beta + tl.program_id(0), tl.sum(tl.sum(logits * evidence, 1), 0))
        result = tl.load(beta).to(wide) * ((tl.sum(logits, 1) / S)[:, None] - logits)
        tl.store(grad_psi + at, result.to(grad_psi.dtype.element_ty), mask=inside)
