"""The null of attention: its logit and its value for each query, and their gradients.

Axes: B batch, H query heads, G key heads, T queries, M nulls, d head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from oasis_attn.errors import UserError


class Null(NamedTuple):
    """The null of one attention call, as one more key of each query.

    Attributes:
        logit_BHT: c, float32 (float64 for float64 queries), broadcastable to `[B, H, T]`.
        value_BHTd: the value, in the same dtype, broadcastable to `[B, H, T, d]`; None for 0.
            Of several nulls, it is the mean of their values, weighted by their probabilities.
    """

    logit_BHT: Tensor
    value_BHTd: Tensor | None

    def output(self, null_BHT: Tensor, dropout: float = 0.0) -> Tensor | None:
        """What the null adds to the output, `[B, H, T, d]`; None if its value is 0.

        Args:
            null_BHT: the null probability.
            dropout: probability of dropping the null of a query.
        """
        if self.value_BHTd is None:
            return None
        if dropout:
            null_BHT = torch.dropout(null_BHT, dropout, train=True)
        return null_BHT.unsqueeze(-1) * self.value_BHTd


def null_of_call(
    query: Tensor,
    groups: int,
    *,
    scale: float,
    softcap: float | None = None,
    null_logit: float | Tensor = 0.0,
    null_key: Tensor | None = None,
    null_value: Tensor | None = None,
) -> Null:
    """The null with the given logit, keys and values; see `null_attention`.

    Args:
        query: `[B, H, T, d]`.
        groups: number of key heads, G.
        scale, softcap: of the logits of keys; they apply to the null keys too.

    Raises:
        UserError: a shape or a dtype is invalid.
    """
    logit_H1 = _null_logits(null_logit, query).unsqueeze(-1)
    heads, precise = query.shape[1], logit_H1.dtype
    if null_key is None and null_value is None:
        return Null(logit_H1, None)
    key_HMd, value_HMd = (
        x if x is None else _by_query_head(name, x, heads, groups).to(query.device, precise)
        for name, x in (("null_key", null_key), ("null_value", null_value))
    )
    nulls = 1 if key_HMd is None else key_HMd.shape[1]
    if value_HMd is not None and value_HMd.shape[1] != nulls:
        expected = "that of null_key" if null_key is not None else "1 without null_key"
        raise UserError(
            f"null_value: shape {list(value_HMd.shape)} has {value_HMd.shape[1]} nulls; their"
            f" number must be {expected}"
        )
    if key_HMd is None:
        return Null(logit_H1, value_HMd)
    if key_HMd.shape[2] != query.shape[3]:
        raise UserError(
            f"null_key: shape {list(key_HMd.shape)} has a width other than the query's"
            f" {query.shape[3]}"
        )
    with torch.autocast(query.device.type, enabled=False):
        logits_BHTM = query.to(precise) @ key_HMd.mT * scale
    if softcap is not None:
        logits_BHTM = softcap * torch.tanh(logits_BHTM / softcap)
    if nulls == 1:
        return Null(logits_BHTM.squeeze(-1) + logit_H1, value_HMd)
    if value_HMd is not None:
        with torch.autocast(query.device.type, enabled=False):
            value_HMd = logits_BHTM.softmax(-1) @ value_HMd
    return Null(logits_BHTM.logsumexp(-1) + logit_H1, value_HMd)


def null_gradients(
    null: Null,
    null_BHT: Tensor,
    delta_BHT: Tensor,
    grad_out: Tensor,
    grad_null: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the logit and the value of `null`.

    The null is one more key with probability n and value v: dv = n dOut, and
    dc = n (dOut . v - delta), with delta = rowsum(dOut * Out).  A gradient dn of n itself adds
    n (1 - n) dn to dc.
    """
    value, along, grad_value = null.value_BHTd, -delta_BHT, None
    if value is not None:
        along = along + (grad_out * value).sum(-1)
        grad_value = (null_BHT.unsqueeze(-1) * grad_out).sum_to_size(value.shape)
    grad_logit = null_BHT * along
    if grad_null is not None:
        grad_logit = grad_logit + grad_null * null_BHT * (1 - null_BHT)
    return grad_logit.sum_to_size(null.logit_BHT.shape), grad_value


def _by_query_head(name: str, x: Tensor, heads: int, groups: int) -> Tensor:
    """`x`, `[H, M, d]` or `[G, M, d]`, as `[H, M, d]`."""
    if x.dim() != 3 or x.shape[0] not in (heads, groups) or 0 in x.shape:
        raise UserError(
            f"{name}: shape {list(x.shape)} is not [heads, nulls, width] with {heads} query heads"
            + (f" or {groups} key heads" if groups != heads else "")
        )
    if not x.is_floating_point():
        raise UserError(f"{name}: dtype {x.dtype} is not floating point")
    return x if x.shape[0] == heads else x.repeat_interleave(heads // groups, 0)


def _null_logits(null_logit: float | Tensor, query: Tensor) -> Tensor:
    """`null_logit` as a tensor `[1]` or `[H]`, in the precision of the logits."""
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads = query.shape[1]
    if not isinstance(null_logit, Tensor):
        try:
            if isinstance(null_logit, int | float):  # a copy to CUDA would wait for its queue
                logits = torch.full((), null_logit, dtype=precise, device=query.device)
            else:
                logits = torch.as_tensor(null_logit, dtype=precise, device=query.device)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise UserError(
                f"null_logit: {null_logit!r} is neither a number nor a tensor [{heads}], one value"
                " per head"
            ) from None
        if isinstance(null_logit, float) and null_logit != null_logit:
            raise UserError("null_logit: nan is not a number; use -inf to switch the null off")
    elif null_logit.is_complex():
        raise UserError(f"null_logit: dtype {null_logit.dtype} is not real")
    else:
        logits = null_logit.to(precise).to(query.device)
    if logits.shape not in ((), (1,), (heads,)):
        raise UserError(
            f"null_logit: shape {list(logits.shape)} is neither [] nor [{heads}] (one per head)"
        )
    return logits.reshape(-1)
