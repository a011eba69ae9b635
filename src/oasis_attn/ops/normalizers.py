"""Maps from attention logits to weights, each with the mass it leaves unspent.

`normalize(scores, name)` returns `(weights, null)`: weights over the last axis, and the null mass
`1 - sum(weights)` computed so that it stays exact where the subtraction would cancel.

    softmax          null 0 (1 on a row that may see nothing)
    softmax1         a null logit c in the denominator; Miller 2023, OutEffHop arXiv 2404.03828
    learned_sink     the same with a learned c per head; gpt-oss, arXiv 2508.10925
    clipped_softmax  clip((1 - gamma) softmax + gamma, 0, 1); arXiv 2306.12929 eq. 4
    softpick         relu(e^x - 1) / sum |e^x - 1|; arXiv 2504.20966 eq. 2
    sparsemax        Euclidean projection on the simplex; Martins & Astudillo 2016
    entmax15         alpha-entmax, alpha 1.5; Peters 2019
    sigmoid          no normalisation at all: each weight on its own
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oasis_attn.errors import check_choice

NORMALIZERS = (
    "softmax",
    "softmax1",
    "learned_sink",
    "clipped_softmax",
    "softpick",
    "sparsemax",
    "entmax15",
    "sigmoid",
)
WITH_NULL = ("softmax1", "learned_sink", "clipped_softmax", "softpick")
"""Normalizers whose rows may sum to less than one, so that a null mass exists to be read."""


def normalize(
    scores: Tensor,
    name: str,
    *,
    mask: Tensor | None = None,
    null_logit: float | Tensor = 0.0,
    clip_gamma: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Normalize `scores` over the last axis.

    Args:
        scores: `[..., n]` logits, floating point; computed in their own dtype.
        name: one of `NORMALIZERS`.
        mask: boolean, broadcastable to `scores`, True where a weight is allowed.
        null_logit: c of `softmax1` and `learned_sink`, broadcastable to `scores[..., 0]`.
        clip_gamma: gamma of `clipped_softmax`, at most 0.

    Returns:
        weights `[..., n]`, 0 where masked, and null mass `[...]`, 1 where all is masked.

    Raises:
        UserError: on an unknown name.
    """
    check_choice("normalizer", name, NORMALIZERS)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    blind = (scores == -torch.inf).all(-1)  # rows that may see nothing
    if name in ("softmax", "softmax1", "learned_sink", "clipped_softmax"):
        c = null_logit if name in ("softmax1", "learned_sink") else -torch.inf
        c = torch.as_tensor(c, dtype=scores.dtype, device=scores.device).expand(blind.shape)
        weights, null = null_softmax(scores, c.masked_fill(blind & (c == -torch.inf), 0))
        if name != "clipped_softmax":
            return weights, null
        weights = ((1 - clip_gamma) * weights + clip_gamma).clamp(0, 1)
        weights = weights.masked_fill(scores == -torch.inf, 0)
        return weights, (1 - weights.sum(-1)).clamp(min=0)
    if scores.shape[-1] == 0:
        return scores, 1 + scores.sum(-1)
    if name == "softpick":
        return _softpick(scores)
    if name == "sigmoid":
        weights = torch.sigmoid(scores)
    else:
        weights = _entmax(scores, name).masked_fill(scores == -torch.inf, 0)
    return weights, blind.to(scores.dtype)


def null_softmax(scores: Tensor, null_logit: float | Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis and one more logit c: `(weights, null)`.

    The joint softmax shifts by max(c, max scores); a shift by max(scores) alone would overflow
    exp(c) on very negative rows, and give NaN where all scores are -inf.
    """
    largest = torch.finfo(scores.dtype).max  # as good as inf, from which nothing can be subtracted
    if not isinstance(null_logit, Tensor):
        joint = F.pad(scores, (0, 1), value=min(null_logit, largest)).softmax(-1)
    else:
        column = null_logit.to(scores.dtype).clamp(max=largest)
        column = column.expand(scores.shape[:-1]).unsqueeze(-1)
        joint = torch.cat([scores, column], -1).softmax(-1)
    return joint[..., :-1], joint[..., -1]


def _softpick(scores: Tensor) -> tuple[Tensor, Tensor]:
    # e^x - 1 with both terms scaled by e^-shift; a masked key adds nothing to either sum.
    seen = scores > -torch.inf
    shift = scores.amax(-1, keepdim=True).clamp(min=0).detach()
    signed = torch.where(seen, torch.exp(scores - shift) - torch.exp(-shift), 0)
    spent, unspent = signed.clamp(min=0), signed.clamp(max=0).neg().sum(-1)
    total = spent.sum(-1) + unspent
    empty = total == 0
    total = total.masked_fill(empty, 1)
    return spent / total.unsqueeze(-1), (unspent / total).masked_fill(empty, 1)


def _entmax(scores: Tensor, name: str) -> Tensor:
    import entmax

    finite = scores.clamp(min=torch.finfo(scores.dtype).min / 4)
    weights: Tensor = getattr(entmax, name)(finite, dim=-1)
    return weights
