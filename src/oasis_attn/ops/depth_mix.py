"""Softmax over depth, and the null signal it listens to.

Attention Residuals (arXiv 2603.15031) read the residual stream as a mix of earlier branch outputs:

    g_{l,i}   = w_l . RMSNorm_l(v_i)                  one pseudo-query w_l per router
    alpha_l   = softmax_i(g_{l,i})                    per token
    h_l       = sum_i alpha_{l,i} v_i                 raw values

OASIS (arXiv 2605.17887) lowers the logit of branches whose attention had nothing to say:

    g'_{l,i}  = g_{l,i} - beta_l (psi_i - mean_r psi_r)

Three steps, each usable alone, so that a model scores a source once for all of its routers:
`depth_scores` (one matrix product and one inverse RMS per source), `depth_weights`, `weighted_sum`.
None of them stacks the sources or keeps a copy of one for backward.

Axes: B batch, T tokens, D width, S sources, R routers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from oasis_attn.errors import UserError, check_choice
from oasis_attn.ops.autograd import HandWritten, first_order
from oasis_attn.ops.normalizers import normalize, null_softmax

BACKENDS = ("auto", "naive", "fused")


def depth_mix(
    sources: Sequence[Tensor],
    query_D: Tensor,
    *,
    key_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    null_evidence: Sequence[Tensor] | None = None,
    coupling: float | Tensor = 0.0,
    normalizer: str = "softmax",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mix `sources` by attention over depth; one router.

    Args:
        sources: S tensors `[B, T, D]` of one dtype, earliest first.
        query_D: the router's pseudo-query w, `[D]`.
        key_norm_weight: gain of the RMSNorm on the keys, `[D]`; default 1.
        eps: of that RMSNorm.
        null_evidence: psi, S tensors `[B, T]` in [0, 1]; None switches the signal off.
        coupling: beta >= 0, a number or a tensor of one element; unused without evidence.
        normalizer: over depth, one of `oasis_attn.ops.normalizers.NORMALIZERS`.
        backend: `naive` (stacks the sources, float32 inside) or `fused`; `auto` is `fused`.

    Returns:
        `mixed_BTD` in the dtype of the sources, and `weights_BTS` in float32 (in float64 for
        float64 sources).

    Raises:
        UserError: on no sources, on shapes or numbers that do not fit, on an unknown name; and when
            a second derivative of `fused` is asked for, which only `naive` has.
    """
    check_choice("backend", backend, BACKENDS)
    _check_shapes(sources, query_D, key_norm_weight, null_evidence)
    _check_numbers(eps, coupling)
    query_1D = (query_D if key_norm_weight is None else query_D * key_norm_weight).unsqueeze(0)
    score = _naive_scores if backend == "naive" else depth_scores
    scores_BTS = torch.cat([score(source, query_1D, eps) for source in sources], -1)
    evidence_BTS = None
    if null_evidence is not None:
        evidence_BTS = torch.stack(tuple(null_evidence), -1).to(scores_BTS.dtype)
    if isinstance(coupling, Tensor):
        coupling = coupling.to(scores_BTS.dtype)
    weights_BTS, _ = depth_weights(scores_BTS, evidence_BTS, coupling, normalizer)
    mix = _naive_sum if backend == "naive" else weighted_sum
    return mix(sources, weights_BTS), weights_BTS


def depth_scores(source_BTD: Tensor, queries_RD: Tensor, eps: float) -> Tensor:
    """g of one source under R pseudo-queries (key-norm gains folded in): `[B, T, R]`, float32.

    Attention Residuals section 3; the gain of an RMSNorm moves to the query, so that R routers
    share the source's one inverse RMS and one matrix product.
    """
    if torch.compiler.is_compiling():
        return _naive_scores(source_BTD, queries_RD, eps)
    if _differentiable(source_BTD, queries_RD):
        return _Scores.apply(source_BTD, queries_RD, eps)[0]
    return _Scores.forward(source_BTD, queries_RD, eps)[0]


def depth_weights(
    scores_BTS: Tensor,
    evidence_BTS: Tensor | None,
    coupling: float | Tensor,
    normalizer: str,
) -> tuple[Tensor, Tensor]:
    """alpha `[B, T, S]` and the depth null mass `[B, T]`, from g and psi (OASIS section 3).

    With the softmax, the mean over sources cancels; with Softmax1 it moves the null's own logit.
    """
    if evidence_BTS is not None:
        scores_BTS = scores_BTS + null_shift(evidence_BTS, coupling)
    if normalizer == "softmax1":
        return null_softmax(scores_BTS, 0.0)
    return normalize(scores_BTS, normalizer)


def null_shift(evidence_BTS: Tensor, coupling: float | Tensor) -> Tensor:
    """What OASIS adds to the depth logits: -beta (psi_i - mean_r psi_r), `[B, T, S]`."""
    return coupling * (evidence_BTS.mean(-1, keepdim=True) - evidence_BTS)


def weighted_sum(sources: Sequence[Tensor], weights_BTS: Tensor) -> Tensor:
    """sum_i weights_i sources_i, `[B, T, D]`, accumulated in the dtype of the weights."""
    return carried_sum(sources, weights_BTS, 0)[0]


def carried_sum(
    sources: Sequence[Tensor], weights_BTS: Tensor, carried: int
) -> tuple[Tensor, list[Tensor]]:
    """`weighted_sum`, and the first `carried` sources for the next sum to read.

    A chain of sums that each read what the one before hands on adds up a source's gradient in one
    buffer, where separate sums would make a tensor each.  That buffer is added to in place, so what
    is handed on is for such sums alone: no other operation may pass its own gradient on to it.
    """
    if _differentiable(weights_BTS, *sources):
        mixed, *rest = _WeightedSum.apply(weights_BTS, carried, *sources)
        return mixed, rest
    return _sum(sources, weights_BTS).to(sources[0].dtype), list(sources[:carried])


def row_products(sources: Sequence[Tensor], query_BTD: Tensor) -> Tensor:
    """`<source_i, query>` over the width for each token, `[B, T, S]` in the dtype of the query."""
    if _differentiable(query_BTD, *sources):
        return _RowProducts.apply(query_BTD, *sources)
    return _row_products(sources, query_BTD)


def fold_sources(
    sources_SBTD: Tensor, logits_SBTR: Tensor, scales_R: Tensor
) -> tuple[Tensor, Tensor]:
    """First phase of inference: R routers read the sources that all of them see, in one pass.

    Returns the softmax mixes, each times its router's scale, `[B, T, R, D]`, and the log-sum-exps
    `[B, T, R]`: to `merge_recent`, a mix is one source with one logit.
    """
    lse_BTR = logits_SBTR.logsumexp(0)
    weights_SBTR = (logits_SBTR - lse_BTR).exp_().mul_(scales_R).to(sources_SBTD.dtype)
    mixes_BTRD = weights_SBTR.permute(1, 2, 3, 0) @ sources_SBTD.permute(1, 2, 0, 3)
    return mixes_BTRD, lse_BTR


def merge_recent(
    mixed_BTD: Tensor, recent: Sequence[Tensor], logits_BTN: Tensor, scale: float
) -> Tensor:
    """Second phase: one router's mix of folded sources joined by recent ones, times `scale`.

    `mixed_BTD` has that scale already.  `logits_BTN` are the log-sum-exp of the folded sources, the
    null's logit for Softmax1, and those of the recent sources.
    """
    weights = logits_BTN.softmax(-1).split(1, -1)
    total = mixed_BTD * weights[0]
    for source_BTD, weight_BT1 in zip(recent, weights[len(weights) - len(recent) :], strict=True):
        total.addcmul_(source_BTD, weight_BT1, value=scale)
    return total.to(mixed_BTD.dtype)


# ---------------------------------------------------------------------------------------- naive


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _naive_scores(source_BTD: Tensor, queries_RD: Tensor, eps: float) -> Tensor:
    value = _precise(source_BTD)
    key = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps)
    with torch.autocast(value.device.type, enabled=False):
        return key @ queries_RD.to(value.dtype).T


def _naive_sum(sources: Sequence[Tensor], weights_BTS: Tensor) -> Tensor:
    stacked_BTSD = torch.stack([_precise(source) for source in sources], -2)
    return (weights_BTS.unsqueeze(-1) * stacked_BTSD).sum(-2).to(sources[0].dtype)


# ---------------------------------------------------------------------------------------- fused


class _Scores(HandWritten):
    """(v @ W^T) * r with r = (mean v^2 + eps)^-1/2, and r; keeps v itself, r and the result."""

    @staticmethod
    def forward(source, queries, eps):
        value = _precise(source)
        square = torch.linalg.vector_norm(value, dim=-1, keepdim=True).square_()
        inverse_rms = (square / value.shape[-1] + eps).rsqrt_()
        with torch.autocast(source.device.type, enabled=False):
            scores = (value @ queries.to(value.dtype).T).mul_(inverse_rms)
        return scores, inverse_rms

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2], *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, _grad_inverse_rms):
        if grad is None:
            return None, None, None
        gradients = partial(_score_gradients, ctx.needs_input_grad)
        return *first_order(gradients, grad, *ctx.saved_tensors), None


def _score_gradients(needed, grad, source, queries, scores, inverse_rms):
    raw = grad * inverse_rms  # gradient of v @ W^T
    grad_source = grad_queries = None
    if needed[0]:
        # d r / d v = -r^3 v / D, and scores = raw product * r
        radial = (grad * scores).sum(-1, keepdim=True) * inverse_rms.square() / source.shape[-1]
        grad_source = (raw @ queries.to(raw.dtype)).addcmul_(source, radial, value=-1)
        grad_source = grad_source.to(source.dtype)
    if needed[1]:
        grad_queries = raw.flatten(0, -2).T @ _precise(source).flatten(0, -2)
        grad_queries = grad_queries.to(queries.dtype)
    return grad_source, grad_queries


class _WeightedSum(HandWritten):
    """One pass over the sources each way, in blocks of tokens small enough to stay in cache."""

    @staticmethod
    def forward(weights, carried, *sources):
        handed_on = [source.view_as(source) for source in sources[:carried]]
        return _sum(sources, weights).to(sources[0].dtype), *handed_on

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: ARG004
        weights, _carried, *sources = inputs
        ctx.save_for_backward(weights, *sources)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, *carried):
        weights, *sources = ctx.saved_tensors
        onto = [*carried, *[None] * (len(sources) - len(carried))]
        if grad is None:
            return None, None, *onto
        gradients = partial(_sum_gradients, ctx.needs_input_grad, not torch.is_grad_enabled())
        grad_weights, *grads = first_order(gradients, grad, weights, *sources, *onto)
        return grad_weights, None, *grads


def _sum_gradients(needed, in_place, grad, weights, *sources_and_onto):
    half = len(sources_and_onto) // 2
    sources, onto = sources_and_onto[:half], sources_and_onto[half:]
    grad = grad.to(weights.dtype)
    grad_weights = _row_products(sources, grad).to(weights.dtype) if needed[0] else None
    return grad_weights, *_scaled(grad, weights, sources, needed[2:], onto, in_place)


class _RowProducts(HandWritten):
    """The transpose of `_WeightedSum`: what one does forward, the other does backward."""

    @staticmethod
    def forward(query, *sources):
        return _row_products(sources, query)

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        gradients = partial(_product_gradients, ctx.needs_input_grad)
        return first_order(gradients, grad, *ctx.saved_tensors)


def _product_gradients(needed, grad, query, *sources):
    grad_query = _sum(sources, grad).to(query.dtype) if needed[0] else None
    return grad_query, *_scaled(query, grad, sources, needed[1:])


def _differentiable(*tensors: Tensor) -> bool:
    """Whether to differentiate by hand; torch.compile itself decides what to keep for backward."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return wanted and not torch.compiler.is_compiling()


def _sum(sources: Sequence[Tensor], weights: Tensor) -> Tensor:
    total = sources[0] * weights[..., :1]
    for index, source in enumerate(sources[1:], start=1):
        total.addcmul_(source, weights[..., index : index + 1])
    return total


def _scaled(
    tensor: Tensor, weights: Tensor, sources, needed, onto=None, in_place: bool = False
) -> list[Tensor | None]:
    """`weights_i * tensor` for each source that needs it, added to `onto_i` if given."""
    results: list[Tensor | None] = []
    for index, (source, need) in enumerate(zip(sources, needed, strict=True)):
        weight = weights[..., index : index + 1]
        if not need:
            results.append(None)
        elif onto is None or onto[index] is None:
            results.append((tensor * weight).to(source.dtype))
        elif in_place:
            results.append(onto[index].addcmul_(tensor, weight))
        else:
            results.append(torch.addcmul(onto[index], tensor, weight).to(source.dtype))
    return results


def _row_products(sources: Sequence[Tensor], other: Tensor) -> Tensor:
    """`<source_i, other>` over the width, `[..., S]`."""
    if torch.compiler.is_compiling():
        return torch.stack([(source * other).sum(-1) for source in sources], -1)
    width = other.shape[-1]
    flat = other.reshape(-1, width)
    rows = max(1, flat.shape[0] if flat.is_cuda else 2**17 // width)
    products = flat.new_empty(len(sources), flat.shape[0])
    scratch = flat.new_empty(min(rows, flat.shape[0]), width)
    flat_sources = [source.reshape(-1, width) for source in sources]
    for start in range(0, flat.shape[0], rows):
        part = flat[start : start + rows]
        for index, source in enumerate(flat_sources):
            product = torch.mul(source[start : start + rows], part, out=scratch[: part.shape[0]])
            torch.sum(product, -1, out=products[index, start : start + rows])
    return products.T.reshape(*other.shape[:-1], len(sources))


# --------------------------------------------------------------------------------------- checks


def _check_shapes(sources, query_D, key_norm_weight, null_evidence) -> None:
    if not sources:
        raise UserError("sources: none given; at least one tensor [batch, tokens, width] is needed")
    first = sources[0]
    if not first.is_floating_point():
        raise UserError(f"sources: dtype {first.dtype} is not floating point")
    for index, source in enumerate(sources):
        if source.dim() != 3 or source.shape != first.shape or source.dtype != first.dtype:
            raise UserError(
                f"sources: number {index} is {list(source.shape)} {source.dtype}; all must be"
                f" [batch, tokens, width] like number 0, {list(first.shape)} {first.dtype}"
            )
    if first.shape[-1] == 0:
        raise UserError("sources: width 0; it must be at least 1")
    for name, vector in (("query_D", query_D), ("key_norm_weight", key_norm_weight)):
        if vector is not None and vector.shape != first.shape[-1:]:
            raise UserError(f"{name}: shape {list(vector.shape)} is not [{first.shape[-1]}]")
    if null_evidence is not None:
        shapes = {tuple(evidence.shape) for evidence in null_evidence}
        if len(null_evidence) != len(sources) or shapes != {tuple(first.shape[:-1])}:
            raise UserError(
                f"null_evidence: {len(null_evidence)} tensors of shapes {sorted(shapes)};"
                f" {len(sources)} of shape {list(first.shape[:-1])} are needed, one per source"
            )


def _check_numbers(eps: float, coupling: float | Tensor) -> None:
    if not (isinstance(eps, int | float) and 0 < eps < math.inf):
        raise UserError(f"eps: {eps!r} is not a finite number above 0")
    if isinstance(coupling, Tensor):
        if coupling.numel() != 1 or not coupling.is_floating_point():
            raise UserError(
                f"coupling: shape {list(coupling.shape)}, {coupling.dtype}; one floating-point"
                " number is needed"
            )
    elif not (isinstance(coupling, int | float) and 0 <= coupling < math.inf):
        raise UserError(f"coupling: {coupling!r} is not a finite number of at least 0")
