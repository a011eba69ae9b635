"""The Kullback-Leibler divergence of two models' predictions, with its gradient.

Axes: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oasis_attn.errors import UserError

CHUNK = 32  # tokens at a time: their distributions should fit in the cache


class _Divergence(torch.autograd.Function):
    """`divergence` as an autograd function that saves only the gradient."""

    @staticmethod
    def forward(ctx: Any, aim_NV: Tensor, logits_NV: Tensor) -> Tensor:
        precise = torch.promote_types(logits_NV.dtype, torch.float32)
        count = len(logits_NV)
        total = torch.zeros((), dtype=precise, device=logits_NV.device)
        grad_NV = torch.empty_like(logits_NV) if ctx.needs_input_grad[1] else None
        for start in range(0, count, CHUNK):
            rows = slice(start, start + CHUNK)
            aim, found = (x[rows].to(precise).log_softmax(-1) for x in (aim_NV, logits_NV))
            wanted = aim.exp()
            total += torch.dot(wanted.flatten(), aim.sub_(found).flatten())
            if grad_NV is not None:
                grad_NV[rows] = found.exp_().sub_(wanted)
        ctx.save_for_backward(grad_NV)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (grad_NV,) = ctx.saved_tensors
        # Not divided before the gradient of a scaled loss arrives: float16 would lose it.
        return None, grad_NV * (grad / len(grad_NV)).to(grad_NV.dtype)


def divergence(aim_BTV: Tensor, logits_BTV: Tensor) -> Tensor:
    """KL(softmax(aim) || softmax(logits)) in nats per token: the loss of distillation.

    Section 2 of Hinton et al. (arXiv 1503.02531) at temperature 1, less the entropy of the aim.
    The gradient is computed with the value, a few tokens at a time, and is all that is kept.

    Args:
        aim_BTV: logits `[B, T, V]` of the model to imitate; they get no gradient.
        logits_BTV: logits of the same shape.

    Returns:
        The mean over all tokens, a scalar in float32 or the higher precision of `logits_BTV`.

    Raises:
        UserError: the shapes differ.
    """
    if aim_BTV.shape != logits_BTV.shape:
        raise UserError(
            f"aim_BTV: shape {tuple(aim_BTV.shape)} is not that of the logits,"
            f" {tuple(logits_BTV.shape)}"
        )
    flat = aim_BTV.detach().flatten(0, -2), logits_BTV.flatten(0, -2)
    result: Tensor = _Divergence.apply(*flat)  # type: ignore[no-untyped-call]
    return result
