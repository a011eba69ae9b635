"""Triton kernels for the scores of a source for all routers with its inverse RMS, and gradients.

Axes: N tokens, D width, R routers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from oasis_attn.ops.depth_mix.triton_kernels.sums import on_device_of, power_of_2, tiles

MAX_ROUTERS = 128  # because one program of the gradients reads the queries of all routers
_PARTS = 24  # programs that share the tokens in the gradients


def can_score(source: Tensor, queries_RD: Tensor) -> bool:
    """Whether the kernels can compute the scores: in float32, for at most `MAX_ROUTERS` routers."""
    wide = torch.float64 in (source.dtype, queries_RD.dtype)
    return not wide and len(queries_RD) <= MAX_ROUTERS


def scores(source: Tensor, queries_RD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`<source, query_r> r` `[..., R]` and r = (mean source^2 + eps)^-1/2 `[..., 1]`, float32."""
    R, D = queries_RD.shape
    found = source.new_empty(*source.shape[:-1], R, dtype=torch.float32)
    inverse_rms = source.new_empty(*source.shape[:-1], 1, dtype=torch.float32)
    N = inverse_rms.numel()
    tokens, columns = 64, 32
    with on_device_of(source):
        _scores_kernel[(tiles(N, tokens),)](
            *(source, queries_RD.contiguous(), found, inverse_rms, N, R, D, eps),
            *(tokens, max(16, power_of_2(R)), columns),
        )
    return found, inverse_rms


def score_gradients(
    grad: Tensor,
    source: Tensor,
    queries_RD: Tensor,
    scores: Tensor,
    inverse_rms: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `scores` for the source and the queries, where `needed`."""
    R, D = queries_RD.shape
    N = inverse_rms.numel()
    tokens, columns, warps = (32, 32, 4) if R <= 32 else (16, 32, 8)
    step = tiles(tiles(N, _PARTS), tokens) * tokens
    parts = tiles(N, step)
    grad_source = torch.empty_like(source) if needed[0] else None
    partial = grad.new_empty(parts, R, D, dtype=torch.float32) if needed[1] else None
    with on_device_of(source):
        _score_gradients_kernel[(tiles(D, columns), parts)](
            *(grad.contiguous(), source, queries_RD.contiguous(), scores, inverse_rms),
            *(grad_source, partial, N, R, D, step),
            *(tokens, max(16, power_of_2(R)), columns),
            num_warps=warps,
        )
    return grad_source, None if partial is None else partial.sum(0).to(queries_RD.dtype)


# -------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["N", "R"])
def _scores_kernel(
    source, queries, scores, inverse_rms, N, R, D, eps,
    TOKENS: tl.constexpr, ROUTERS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    routers = tl.arange(0, ROUTERS)
    products = tl.zeros([TOKENS, ROUTERS], tl.float32)
    squares = tl.zeros([TOKENS], tl.float32)
    for start in range(0, D, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        read = (rows < N)[:, None] & (columns < D)[None, :]
        value = tl.load(source + rows[:, None] * D + columns[None, :], mask=read, other=0.0)
        value = value.to(tl.float32)
        read = (routers < R)[None, :] & (columns < D)[:, None]
        query = tl.load(queries + routers[None, :] * D + columns[:, None], mask=read, other=0.0)
        products = tl.dot(value, query.to(tl.float32), products, input_precision="ieee")
        squares += tl.sum(value * value, 1)
    inverse = 1 / tl.sqrt_rn(squares / D + eps)
    written = (rows < N)[:, None] & (routers < R)[None, :]
    result = products * inverse[:, None]
    tl.store(scores + rows[:, None] * R + routers[None, :], result, mask=written)
    tl.store(inverse_rms + rows, inverse, mask=rows < N)


@triton.jit(do_not_specialize=["N", "R", "step"])
def _score_gradients_kernel(
    grad, source, queries, scores, inverse_rms, grad_source, grad_queries, N, R, D, step,
    TOKENS: tl.constexpr, ROUTERS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # With p = <v, w> and g = p r: dp = r dg, and dr / dv = -r^3 v / D.
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    routers = tl.arange(0, ROUTERS)
    first = tl.program_id(1).to(tl.int64) * step
    at_query = routers[:, None] * D + columns[None, :]
    has_query = (routers < R)[:, None] & (columns < D)[None, :]
    query = tl.load(queries + at_query, mask=has_query, other=0.0).to(tl.float32)
    total = tl.zeros([ROUTERS, COLUMNS], tl.float32)
    for start in range(first, min(first + step, N), TOKENS):
        rows = start + tl.arange(0, TOKENS)
        read = (rows < N)[:, None] & (routers < R)[None, :]
        at_score = rows[:, None] * R + routers[None, :]
        upstream = tl.load(grad + at_score, mask=read, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_rms + rows, mask=rows < N, other=0.0)
        raw = upstream * inverse[:, None]
        read_source = (rows < N)[:, None] & (columns < D)[None, :]
        at_source = rows[:, None] * D + columns[None, :]
        value = tl.load(source + at_source, mask=read_source, other=0.0).to(tl.float32)
        if grad_source is not None:
            score = tl.load(scores + at_score, mask=read, other=0.0)
            radial = tl.sum(upstream * score, 1) * inverse * inverse / D
            result = tl.dot(raw, query, input_precision="ieee") - value * radial[:, None]
            result = result.to(grad_source.dtype.element_ty)
            tl.store(grad_source + at_source, result, mask=read_source)
        if grad_queries is not None:
            total = tl.dot(tl.trans(raw), value, total, input_precision="ieee")
    if grad_queries is not None:
        grad_queries += tl.program_id(1).to(tl.int64) * R * D
        tl.store(grad_queries + at_query, total, mask=has_query)
