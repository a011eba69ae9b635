"""The passes over the sources that compute a mix and its hand-written gradients.

On CUDA with Triton, a pass is one kernel of the package `triton_kernels`; elsewhere it is a loop of
PyTorch operations over the sources.

Axes: B batch, T tokens, D width, S sources, R routers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oasis_attn.ops.compiled import kernels_for
from oasis_attn.ops.depth_mix.naive import at_least_float32


def weighted_sum(sources: Sequence[Tensor], weights_BTS: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_i weights_i sources_i, `[B, T, D]` in `dtype`, accumulated in the weights' dtype."""
    kernels = kernels_for(sources)
    if kernels is not None:
        mixed_BTD: Tensor = kernels.weighted_sum(sources, weights_BTS, dtype)
        return mixed_BTD
    total_BTD = sources[0] * weights_BTS[..., :1]
    for index, source in enumerate(sources[1:], start=1):
        total_BTD.addcmul_(source, weights_BTS[..., index : index + 1])
    return total_BTD.to(dtype)


def row_products(sources: Sequence[Tensor], other_BTD: Tensor) -> Tensor:
    """`<source_i, other>` over the width, `[B, T, S]` in the dtype of `other`."""
    kernels = kernels_for(sources)
    if kernels is not None:
        wide_BTD = at_least_float32(other_BTD)
        products_BTS: Tensor = kernels.sum_gradients(sources, wide_BTD, None, [], [])
        return products_BTS.to(other_BTD.dtype)
    if torch.compiler.is_compiling():
        return torch.stack([(source * other_BTD).sum(-1) for source in sources], -1)
    # On a CPU: in blocks of tokens that fit in the processor's cache.
    width = other_BTD.shape[-1]
    flat = other_BTD.reshape(-1, width)
    rows = max(1, flat.shape[0] if flat.is_cuda else 2**17 // width)
    products = flat.new_empty(len(sources), flat.shape[0])
    scratch = flat.new_empty(min(rows, flat.shape[0]), width)
    flat_sources = [source.reshape(-1, width) for source in sources]
    for start in range(0, flat.shape[0], rows):
        part = flat[start : start + rows]
        for index, source in enumerate(flat_sources):
            product = torch.mul(source[start : start + rows], part, out=scratch[: part.shape[0]])
            torch.sum(product, -1, out=products[index, start : start + rows])
    return products.T.reshape(*other_BTD.shape[:-1], len(sources))


def sum_gradients(
    sources: Sequence[Tensor],
    weights_BTS: Tensor,
    grad_BTD: Tensor,
    needed: Sequence[bool],
    later: Sequence[Tensor | None] | None = None,
    *,
    in_place: bool = False,
    products: bool = True,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of `weighted_sum`.

    Args:
        sources, weights_BTS: its arguments.
        grad_BTD: the gradient of its result.
        needed: whether the gradient of each source is needed.
        later: for each source, a gradient from later sums to which this one is added, or None.
        in_place: write that sum to the memory of `later`.
        products: compute the gradient of the weights.

    Returns:
        The gradient of the weights `[B, T, S]`, or None; and of each source, `weights_i grad` plus
        `later_i`, or None where not needed.
    """
    olds = [None] * len(sources) if later is None else later
    kernels = kernels_for(sources)
    if kernels is not None and kernels.can_add(olds, sources):
        into = [
            None if not need else old if in_place and old is not None else torch.empty_like(source)
            for source, old, need in zip(sources, olds, needed, strict=True)
        ]
        grad_BTS = kernels.sum_gradients(sources, grad_BTD, weights_BTS, olds, into, products)
        return grad_BTS, into
    grad_BTD = grad_BTD.to(weights_BTS.dtype)
    grad_BTS = row_products(sources, grad_BTD) if products else None
    grads: list[Tensor | None] = []
    for index, (source, need, old) in enumerate(zip(sources, needed, olds, strict=True)):
        weight_BT1 = weights_BTS[..., index : index + 1]
        if not need:
            grads.append(None)
        elif old is None:
            grads.append((grad_BTD * weight_BT1).to(source.dtype))
        elif in_place:
            grads.append(old.addcmul_(grad_BTD, weight_BT1))
        else:
            grads.append(torch.addcmul(old, grad_BTD, weight_BT1).to(source.dtype))
    return grad_BTS, grads


def scores(source_BTD: Tensor, queries_RD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`<source, query_r> r` `[B, T, R]` and r = (mean source^2 + eps)^-1/2 `[B, T, 1]`."""
    kernels = kernels_for([source_BTD])
    if kernels is not None and kernels.can_score(source_BTD, queries_RD):
        result: tuple[Tensor, Tensor] = kernels.scores(source_BTD, queries_RD, eps)
        return result
    value_BTD = at_least_float32(source_BTD)
    square_BT1 = torch.linalg.vector_norm(value_BTD, dim=-1, keepdim=True).square_()
    inverse_BT1 = (square_BT1 / value_BTD.shape[-1] + eps).rsqrt_()
    with torch.autocast(source_BTD.device.type, enabled=False):
        scores_BTR = value_BTD @ queries_RD.to(value_BTD.dtype).T * inverse_BT1
    return scores_BTR, inverse_BT1


def score_gradients(
    grad_BTR: Tensor,
    source_BTD: Tensor,
    queries_RD: Tensor,
    scores_BTR: Tensor,
    inverse_BT1: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `scores` for the source and the queries, where `needed`."""
    kernels = kernels_for([source_BTD])
    if kernels is not None and kernels.can_score(source_BTD, queries_RD):
        arguments = (grad_BTR, source_BTD, queries_RD, scores_BTR, inverse_BT1, needed)
        grads: tuple[Tensor | None, Tensor | None] = kernels.score_gradients(*arguments)
        return grads
    raw_BTR = grad_BTR * inverse_BT1  # gradient of v @ W^T
    grad_source = grad_queries = None
    if needed[0]:
        # d r / d v = -r^3 v / D, and scores = raw product * r
        radial_BT1 = (grad_BTR * scores_BTR).sum(-1, keepdim=True) * inverse_BT1.square()
        radial_BT1 = radial_BT1 / source_BTD.shape[-1]
        grad_source = (raw_BTR @ queries_RD.to(raw_BTR.dtype)).addcmul_(
            source_BTD, radial_BT1, value=-1
        )
        grad_source = grad_source.to(source_BTD.dtype)
    if needed[1]:
        grad_queries = raw_BTR.flatten(0, -2).T @ at_least_float32(source_BTD).flatten(0, -2)
        grad_queries = grad_queries.to(queries_RD.dtype)
    return grad_source, grad_queries
