"""Attention over depth, and the null signal that it uses.

Attention Residuals (arXiv 2603.15031) replace the residual sum by a mix of the earlier outputs.
Sublayers are numbered from 1, and v_0 is the embedding.  Router r reads v_0 ... v_r:

    g_{r,i}   = w_r . RMSNorm_r(v_i)                  one pseudo-query w_r per router
    alpha_r   = softmax_i(g_{r,i})                    for each token
    h_r       = sum_i alpha_{r,i} v_i                 the input of sublayer r + 1

OASIS (arXiv 2605.17887) lowers the logits of outputs whose attention put weight on the null:

    g'_{r,i}  = g_{r,i} - beta_r (psi_i - mean_j psi_j)

Words, in this package and in `modeling`:

    branch     the output of one sublayer (attention or MLP), before it is added to the residual
    source     v_i: the embedding, a branch, or the sum of the branches of a block
    weights    alpha, `[B, T, S]`: what one router gives to its sources; never model parameters
    mix        h, `[B, T, D]`: the sum of the sources with these weights
    mixer      an object that holds the sources of one forward pass and computes each router's mix

`depth_mix` computes one mix.  A model uses a mixer: `AutogradMixer` if gradients are needed, else
`TwoPhaseMixer` or, if it supports the call, one with compiled kernels: `CMixer` on a CPU with a C
compiler, `TritonMixer` on CUDA with Triton.  Each is tested against `naive.py`.

Axes: B batch, T tokens, D width, S sources, R routers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from oasis_attn.errors import UserError, check_choice
from oasis_attn.ops.compiled import compiled_mixer
from oasis_attn.ops.depth_mix.autograd import depth_scores, depth_weights, weighted_sum
from oasis_attn.ops.depth_mix.autograd_mixer import AutogradMixer
from oasis_attn.ops.depth_mix.naive import naive_scores, naive_sum
from oasis_attn.ops.depth_mix.routers import Mixer, Routers
from oasis_attn.ops.depth_mix.two_phase_mixer import TwoPhaseMixer

__all__ = [
    "AutogradMixer",
    "Mixer",
    "Routers",
    "TwoPhaseMixer",
    "depth_mix",
    "inference_mixer",
    "needs_autograd_mixer",
]
BACKENDS = ("auto", "naive", "fused")


def depth_mix(
    sources: Sequence[Tensor],
    query_D: Tensor,
    *,
    key_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    null_evidence: Sequence[Tensor] | None = None,
    beta: float | Tensor = 0.0,
    normalizer: str = "softmax",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mix `sources` by attention over depth, with one router.

    Args:
        sources: S tensors `[B, T, D]` of one dtype, earliest first.
        query_D: the router's pseudo-query w, `[D]`.
        key_norm_weight: gain of the RMSNorm on the keys, `[D]`; default 1.
        eps: eps of that RMSNorm.
        null_evidence: psi, S tensors `[B, T]` in [0, 1]; None switches the null signal off.
        beta: strength of the null signal, at least 0: a number or a tensor of one element; unused
            without null evidence.
        normalizer: over depth, one of `oasis_attn.ops.normalizers.NORMALIZERS`.
        backend: `naive` (stacks the sources, float32 inside) or `fused`; `auto` is `fused`.

    Returns:
        `mixed_BTD` in the dtype of the sources, and `weights_BTS` in float32 (in float64 for
        float64 sources).

    Raises:
        UserError: there are no sources, a shape or number is not valid, or a name is unknown; also
            when a second derivative of `fused` is computed, which only `naive` supports.
    """
    check_choice("backend", backend, BACKENDS)
    _check_shapes(sources, query_D, key_norm_weight, null_evidence)
    _check_numbers(eps, beta)
    query_1D = (query_D if key_norm_weight is None else query_D * key_norm_weight).unsqueeze(0)
    score = naive_scores if backend == "naive" else depth_scores
    scores_BTS = torch.cat([score(source, query_1D, eps) for source in sources], -1)
    psi_BTS = None
    if null_evidence is not None:
        psi_BTS = torch.stack(tuple(null_evidence), -1).to(scores_BTS.dtype)
    if isinstance(beta, Tensor):
        beta = beta.to(scores_BTS.dtype)
    weights_BTS, _ = depth_weights(scores_BTS, psi_BTS, beta, normalizer)
    mix = naive_sum if backend == "naive" else weighted_sum
    return mix(sources, weights_BTS), weights_BTS


def needs_autograd_mixer(routers: Routers) -> bool:
    """Whether a forward pass needs `AutogradMixer`.

    It is needed while gradients are recorded, and for a dropped source and sigmoid weights, which
    no other mixer supports.
    """
    return torch.is_grad_enabled() or routers.normalizer == "sigmoid" or routers.dropped is not None


def inference_mixer(embedding_BTD: Tensor, routers: Routers, *, one_device: bool = True) -> Mixer:
    """A mixer without gradients for one forward pass.

    `one_device` says that all layers are on the device of the embedding.
    """
    compiled = compiled_mixer(embedding_BTD, routers, one_device=one_device)
    return TwoPhaseMixer(embedding_BTD, routers) if compiled is None else compiled


def _check_shapes(
    sources: Sequence[Tensor],
    query_D: Tensor,
    key_norm_weight: Tensor | None,
    null_evidence: Sequence[Tensor] | None,
) -> None:
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


def _check_numbers(eps: float, beta: float | Tensor) -> None:
    if not (isinstance(eps, int | float) and 0 < eps < math.inf):
        raise UserError(f"eps: {eps!r} is not a finite number above 0")
    if isinstance(beta, Tensor):
        if beta.numel() != 1 or not beta.is_floating_point():
            raise UserError(
                f"beta: shape {list(beta.shape)}, {beta.dtype}; one floating-point number is needed"
            )
    elif not (isinstance(beta, int | float) and 0 <= beta < math.inf):
        raise UserError(f"beta: {beta!r} is not a finite number of at least 0")
