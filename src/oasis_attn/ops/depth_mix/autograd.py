"""Differentiable mixes over depth with hand-written gradients.

Three steps, each usable alone, so that a model scores a source once for all of its routers:
`depth_scores` (one matrix product and one inverse RMS per source), `depth_weights`, `weighted_sum`.
None of them stacks the sources or keeps a copy of one for backward.

Axes: B batch, T tokens, D width, S sources, R routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from oasis_attn.ops.autograd import HandWritten, first_order
from oasis_attn.ops.depth_mix import passes
from oasis_attn.ops.depth_mix.naive import naive_scores
from oasis_attn.ops.normalizers import normalize, null_softmax


def depth_scores(source_BTD: Tensor, queries_RD: Tensor, eps: float) -> Tensor:
    """g of one source under R pseudo-queries (key-norm gains folded in): `[B, T, R]`, float32.

    Attention Residuals section 3; the gain of an RMSNorm moves to the query, so that R routers
    share the source's one inverse RMS and one matrix product.
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

    With the softmax, the mean over sources cancels; with Softmax1 it moves the null's own logit.
    """
    kernels = passes.kernels_for([scores_BTS])
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
    """What OASIS adds to the depth logits: -beta (psi_i - mean_r psi_r), `[B, T, S]`."""
    return beta * (psi_BTS.mean(-1, keepdim=True) - psi_BTS)


def weighted_sum(
    sources: Sequence[Tensor], weights_BTS: Tensor, known_BTD: Tensor | None = None
) -> Tensor:
    """sum_i weights_i sources_i, `[B, T, D]`, accumulated in the dtype of the weights.

    `known_BTD` is that sum where it has been computed before: only the gradient is then added.
    """
    return carried_sum(sources, weights_BTS, 0, known_BTD)[0]


def carried_sum(
    sources: Sequence[Tensor], weights_BTS: Tensor, carried: int, known_BTD: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """`weighted_sum`, and the first `carried` sources for the next sum to read.

    A chain of sums that each read what the one before hands on adds up a source's gradient in one
    buffer, where separate sums would make a tensor each.  That buffer is added to in place, so what
    is handed on is for such sums alone: no other operation may pass its own gradient on to it.
    """
    if _differentiable(weights_BTS, *sources):
        arguments = (weights_BTS, carried, known_BTD, *sources)
        mixed, *rest = _WeightedSum.apply(*arguments)  # type: ignore[no-untyped-call]
        return mixed, rest
    mixed_BTD = passes.weighted_sum(sources, weights_BTS, sources[0].dtype)
    return mixed_BTD, list(sources[:carried])


def row_products(sources: Sequence[Tensor], query_BTD: Tensor) -> Tensor:
    """`<source_i, query>` over the width for each token, `[B, T, S]` in the dtype of the query."""
    if _differentiable(query_BTD, *sources):
        products_BTS: Tensor = _RowProducts.apply(  # type: ignore[no-untyped-call]
            query_BTD, *sources
        )
        return products_BTS
    return passes.row_products(sources, query_BTD)


# ---------------------------------------------------------------------------------------- fused


class _Scores(HandWritten):
    """(v @ W^T) * r with r = (mean v^2 + eps)^-1/2, and r; keeps v itself, r and the result."""

    @staticmethod
    def forward(source: Tensor, queries: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return passes.scores(source, queries, eps)

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
        gradients = partial(passes.score_gradients, needed=ctx.needs_input_grad)
        return *first_order(gradients, grad, *ctx.saved_tensors), None


class _Weights(HandWritten):
    """`depth_weights` as one kernel of `triton_kernels`; elsewhere PyTorch differentiates it."""

    @staticmethod
    def forward(
        scores: Tensor, psi: Tensor | None, beta: Tensor | None, with_null: bool
    ) -> tuple[Tensor, Tensor]:
        kernels = passes.triton_kernels()
        assert kernels is not None
        found: tuple[Tensor, Tensor] = kernels.weights(scores, psi, beta, with_null)
        return found

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
        kernels = passes.triton_kernels()
        assert kernels is not None
        saved = ctx.saved_tensors
        return *first_order(kernels.weight_gradients, grad, grad_null, *saved), None


class _WeightedSum(HandWritten):
    """One pass over the sources each way."""

    @staticmethod
    def forward(
        weights: Tensor, carried: int, known: Tensor | None, *sources: Tensor
    ) -> tuple[Tensor, ...]:
        handed_on = [source.view_as(source) for source in sources[:carried]]
        if known is None:
            known = passes.weighted_sum(sources, weights, sources[0].dtype)
        return known, *handed_on

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        weights, _carried, _known, *sources = inputs
        ctx.save_for_backward(weights, *sources)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, *carried: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        weights, *sources = ctx.saved_tensors
        onto = [*carried, *[None] * (len(sources) - len(carried))]
        if grad is None:
            return None, None, None, *onto
        gradients = partial(_sum_gradients, ctx.needs_input_grad, not torch.is_grad_enabled())
        grad_weights, *grads = first_order(gradients, grad, weights, *sources, *onto)
        return grad_weights, None, None, *grads


def _sum_gradients(
    needed: Sequence[bool], in_place: bool, grad: Tensor, weights: Tensor, *sources_and_onto: Any
) -> tuple[Tensor | None, ...]:
    half = len(sources_and_onto) // 2
    sources, onto = sources_and_onto[:half], sources_and_onto[half:]
    grad_weights, grads = passes.sum_gradients(
        sources, weights, grad, needed[3:], onto, in_place=in_place, products=needed[0]
    )
    return grad_weights, *grads


class _RowProducts(HandWritten):
    """The transpose of `_WeightedSum`: what one does forward, the other does backward."""

    @staticmethod
    def forward(query: Tensor, *sources: Tensor) -> Tensor:
        return passes.row_products(sources, query)

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
    grad_query = passes.weighted_sum(sources, grad, query.dtype) if needed[0] else None
    _, grads = passes.sum_gradients(sources, grad, query, needed[1:], products=False)
    return grad_query, *grads


def _differentiable(*tensors: Tensor) -> bool:
    """Whether to differentiate by hand; torch.compile itself decides what to keep for backward."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return wanted and not torch.compiler.is_compiling()
