"""Attention with a null option by PyTorch's `flex_attention` (CUDA; forward only on the CPU).

Axes: B batch, H query heads, T queries, S keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oasis_attn.ops.null_attention.cpu_flash import pad_head_width
from oasis_attn.ops.null_attention.naive import lse_with_null
from oasis_attn.ops.null_attention.null import Null

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # size of a tile of the kernel, in queries and in keys
_LEAST_WIDTH = 16  # smallest head width of the compiled kernel


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null: Null,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, null probability, and log-sum-exp over keys and null; `mask` has four axes."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    T, S = query.shape[2], key.shape[2]
    block_mask = causal_blocks(T, S, query.device) if is_causal else None
    own = value.shape[-1]
    query, key, value = (
        pad_head_width(x, max(x.shape[-1], _LEAST_WIDTH)) for x in (query, key, value)
    )
    if mask is not None:
        mask = mask.expand(query.shape[0], query.shape[1], T, S)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if mask is None:
            return score
        allowed = mask[b, h, t, s]
        return (
            torch.where(allowed, score, -math.inf) if mask.dtype == torch.bool else score + allowed
        )

    eager = query.is_cuda and not torch.compiler.is_compiling()
    attention: Any = _compiled_flex() if eager else flex_attention
    out, aux = attention(
        query, key, value,
        score_mod=None if softcap is None and mask is None else score_mod,
        block_mask=block_mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    c = null.logit_BHT
    lse = aux.lse.to(c.dtype)
    fully_masked = lse.detach() == -math.inf
    keep = torch.sigmoid(lse - c).masked_fill(fully_masked, 0)
    null_BHT = torch.sigmoid(c - lse).masked_fill(fully_masked, 1)
    out = out[..., :own] * keep.unsqueeze(-1)
    of_null = null.output(null_BHT)
    out = out if of_null is None else out + of_null
    return out.to(query.dtype), null_BHT, lse_with_null(lse, c).detach()


def causal_blocks(T: int, S: int, device: torch.device) -> BlockMask:
    """The `BlockMask` in which query t attends to keys up to t + S - T.

    It equals the result of `create_block_mask`, which would evaluate a mask of T x S entries; here
    only the edges of the blocks are compared.
    """
    from torch.nn.attention.flex_attention import BlockMask

    offset = S - T
    behind = torch.full((), offset, device=device)  # a number that changes would compile anew
    first_query = torch.arange(0, T, BLOCK, device=device)[:, None]
    first_key = torch.arange(0, S, BLOCK, device=device)
    whole = (first_query + BLOCK <= T) & (first_key + BLOCK <= S)
    full = whole & (first_key + BLOCK - 1 <= first_query + offset)
    last_query = (first_query + BLOCK - 1).clamp(max=T - 1)
    partial = (first_key <= last_query + offset) & ~full
    return BlockMask.from_kv_blocks(
        *_counts_and_indices(partial),
        *_counts_and_indices(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda _b, _h, t, s: s <= t + behind,
        seq_lengths=(T, S),
    )


def _counts_and_indices(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The number of key blocks that each query block reads, and their indices, those read first."""
    blocks = blocks.to(torch.int32)[None, None]
    order = blocks.argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Any = flex_attention
    return torch.compile(function)
