"""The three steps of a mix over depth, differentiable, with hand-written gradients.

    depth_scores     g of one source for all routers: one matrix product and one inverse RMS
    depth_weights    alpha of one router, from g and psi
    weighted_sum     the mix of one router, from alpha and the sources

A model scores each source once, for all routers that will read it.  No step stacks the sources or
saves a copy of one for backward.

Axes: B batch, T tokens, D width, S sources, R routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from oasis_attn.ops.autograd import HandWritten, first_order
from oasis_attn.ops.compiled import kernels_for, triton_kernels
from oasis_attn.ops.depth_mix.naive import naive_scores
from oasis_attn.ops.depth_mix.passes import row_products as products_pass
from oasis_attn.ops.depth_mix.passes import score_gradients, sum_gradients
from oasis_attn.ops.depth_mix.passes import scores as scores_pass
from oasis_attn.ops.depth_mix.passes import weighted_sum as sum_pass
from oasis_attn.ops.normalizers import normalize, null_softmax


def depth_scores(source_BTD: Tensor, queries_RD: Tensor, eps: float) -> Tensor:
    """g of one source for R routers, `[B, T, R]`, float32 (Attention Residuals section 3).

    `queries_RD` are the pseudo-queries times the gains of the key norms.  Without gains of their
    own, the keys of all routers are the same, so that R routers need one inverse RMS and one matrix
    product.
    """
    if torch.compiler.is_compiling():
        return naive_scores(source_BTD, queries_RD, eps)
    if _differentiable(source_BTD, queries_RD):
        scores_BTR: Tensor = _Scores.apply(source_BTD, queries_RD, eps)[0]  # type: ignore[no-untyped-call]
        return scores_BTR
    return _Scores.forward(source_BTD, queries_RD, eps)[0]


def depth_weights(
    scores_BTS: Tensor,
    psi_BTS: Tensor | None,
    beta: float | Tensor,
    normalizer: str,
) -> tuple[Tensor, Tensor]:
    """alpha `[B, T, S]` and the depth null probability `[B, T]`, from g and psi (OASIS section 3).

    The mean of psi over the sources has no effect on a softmax; in a Softmax1 it has the same
    effect as a change of the null logit.
    """
    kernels = kernels_for([scores_BTS])
    if kernels is not None and normalizer in ("softmax", "softmax1"):
        strength = None
        if psi_BTS is not None:
            strength = beta if isinstance(beta, Tensor) else scores_BTS.new_full((), beta)
        arguments = (scores_BTS, psi_BTS, strength, normalizer == "softmax1")
        if _differentiable(*(x for x in arguments if isinstance(x, Tensor))):
            weights_BTS, null_BT = _Weights.apply(*arguments)  # type: ignore[no-untyped-call]
            return weights_BTS, null_BT
        return _Weights.forward(*arguments)
    if psi_BTS is not None:
        scores_BTS = scores_BTS + null_shift(psi_BTS, beta)
    if normalizer == "softmax1":
        return null_softmax(scores_BTS, 0.0)
    return normalize(scores_BTS, normalizer)


def null_shift(psi_BTS: Tensor, beta: float | Tensor) -> Tensor:
    """The term that OASIS adds to the depth logits: -beta (psi_i - mean psi), `[B, T, S]`."""
    return beta * (psi_BTS.mean(-1, keepdim=True) - psi_BTS)


def weighted_sum(
    sources: Sequence[Tensor], weights_BTS: Tensor, known_BTD: Tensor | None = None
) -> Tensor:
    """sum_i weights_i sources_i, `[B, T, D]`, accumulated in the dtype of the weights.

    `known_BTD` is this sum, if it has been computed before; the function then only adds the
    gradient to it.
    """
    return chained_sum(sources, weights_BTS, 0, known_BTD)[0]


def chained_sum(
    sources: Sequence[Tensor], weights_BTS: Tensor, count: int, known_BTD: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """`weighted_sum`, and the first `count` sources again, for the next sum of a chain.

    Many routers read the same source.  If each of their sums read the source itself, backward would
    allocate one gradient per sum and then add them.  If each sum reads the sources that the
    previous sum returned, backward adds all gradients of a source to one buffer, in place.
    Therefore only `chained_sum` may read the returned sources: the gradient of another operation
    could share memory with a tensor that is still needed.
    """
    if _differentiable(weights_BTS, *sources):
        arguments = (weights_BTS, count, known_BTD, *sources)
        mixed, *rest = _WeightedSum.apply(*arguments)  # type: ignore[no-untyped-call]
        return mixed, rest
    mixed_BTD = sum_pass(sources, weights_BTS, sources[0].dtype)
    return mixed_BTD, list(sources[:count])


def row_products(sources: Sequence[Tensor], query_BTD: Tensor) -> Tensor:
    """`<source_i, query>` over the width for each token, `[B, T, S]` in the dtype of the query."""
    if _differentiable(query_BTD, *sources):
        products_BTS: Tensor = _RowProducts.apply(  # type: ignore[no-untyped-call]
            query_BTD, *sources
        )
        return products_BTS
    return products_pass(sources, query_BTD)


# --------------------------------------------------------------------------- autograd functions


class _Scores(HandWritten):
    """(v @ W^T) r and r = (mean v^2 + eps)^-1/2; saves v itself (no copy), r and the result."""

    @staticmethod
    def forward(source: Tensor, queries: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return scores_pass(source, queries, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:2], *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, _grad_inverse_rms: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        gradients = partial(score_gradients, needed=ctx.needs_input_grad)
        return *first_order(gradients, grad, *ctx.saved_tensors), None


class _Weights(HandWritten):
    """`depth_weights` as one Triton kernel; without Triton, PyTorch differentiates the steps."""

    @staticmethod
    def forward(
        scores: Tensor, psi: Tensor | None, beta: Tensor | None, with_null: bool
    ) -> tuple[Tensor, Tensor]:
        kernels = triton_kernels()
        assert kernels is not None
        result: tuple[Tensor, Tensor] = kernels.weights(scores, psi, beta, with_null)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*output, *inputs[1:3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_null: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad is None and grad_null is None:
            return None, None, None, None
        kernels = triton_kernels()
        assert kernels is not None
        saved = ctx.saved_tensors
        return *first_order(kernels.weight_gradients, grad, grad_null, *saved), None


class _WeightedSum(HandWritten):
    """`chained_sum`: outputs are the sum and views of the first `count` sources.

    Forward and backward read each source once.  The incoming gradient of a returned source is the
    sum over all later routers of the chain; backward adds this router's own term to it, in place,
    and returns it as the gradient of that source.
    """

    @staticmethod
    def forward(
        weights: Tensor, count: int, known: Tensor | None, *sources: Tensor
    ) -> tuple[Tensor, ...]:
        returned = [source.view_as(source) for source in sources[:count]]
        if known is None:
            known = sum_pass(sources, weights, sources[0].dtype)
        return known, *returned

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        weights, _count, _known, *sources = inputs
        ctx.save_for_backward(weights, *sources)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, *later_grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        weights, *sources = ctx.saved_tensors
        later = [*later_grads, *[None] * (len(sources) - len(later_grads))]
        if grad is None:
            return None, None, None, *later
        gradients = partial(_sum_gradients, ctx.needs_input_grad, not torch.is_grad_enabled())
        grad_weights, *grads = first_order(gradients, grad, weights, *sources, *later)
        return grad_weights, None, None, *grads


def _sum_gradients(
    needed: Sequence[bool], in_place: bool, grad: Tensor, weights: Tensor, *sources_and_later: Any
) -> tuple[Tensor | None, ...]:
    half = len(sources_and_later) // 2
    sources, later = sources_and_later[:half], sources_and_later[half:]
    grad_weights, grads = sum_gradients(
        sources, weights, grad, needed[3:], later, in_place=in_place, products=needed[0]
    )
    return grad_weights, *grads


class _RowProducts(HandWritten):
    """`row_products`; its backward is a weighted sum, as the backward of a sum is row products."""

    @staticmethod
    def forward(query: Tensor, *sources: Tensor) -> Tensor:
        return products_pass(sources, query)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = partial(_product_gradients, ctx.needs_input_grad)
        grads: tuple[Tensor | None, ...] = first_order(gradients, grad, *ctx.saved_tensors)
        return grads


def _product_gradients(
    needed: Sequence[bool], grad: Tensor, query: Tensor, *sources: Tensor
) -> tuple[Tensor | None, ...]:
    grad_query = sum_pass(sources, grad, query.dtype) if needed[0] else None
    _, grads = sum_gradients(sources, grad, query, needed[1:], products=False)
    return grad_query, *grads


def _differentiable(*tensors: Tensor) -> bool:
    """Whether the hand-written gradient is needed: torch.compile derives its own."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return wanted and not torch.compiler.is_compiling()
