"""Functions from attention logits to attention weights and the null probability.

`normalize(scores, name)` returns `(weights, null)`: weights over the last axis, and the null
probability, `1 - sum(weights)`.  For the forms with a null logit and softpick it is computed
without this subtraction, so that small values stay accurate.

    softmax          null 0 (1 if the whole row is masked)
    softmax1         a null logit c in the denominator; Miller 2023, OutEffHop arXiv 2404.03828
    learned_sink     softmax1 with a learned c per head; gpt-oss, arXiv 2508.10925
    value_null       learned_sink with a learned value per head, which the null adds to the output
    key_null         learned_sink with a learned key per head, so that c depends on the query;
                     `nulls` of them, default 1
    key_value_null   key_null with a learned value for each key: the attention bias of Sun et al.
                     2024, arXiv 2402.17762
    clipped_softmax  clip((1 - gamma) softmax + gamma, 0, 1), gamma < 0, or gamma = -alpha / length
                     with the length of the training sequences; arXiv 2306.12929 eq. 4 and 4.2
    softpick         relu(e^x - 1) / sum |e^x - 1|; arXiv 2504.20966 eq. 2
    sparsemax        Euclidean projection on the simplex; Martins & Astudillo 2016
    entmax15         alpha-entmax, alpha 1.5; Peters 2019
    sigmoid          sigmoid(x) for each key; weights are not normalized over the row

`register_token_normalizer` adds one for token attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from oasis_attn.errors import UserError, check_at_least, check_choice, check_whole
from oasis_attn.registry import Registry


class TokenNormalizer(NamedTuple):
    """A normalizer and its arguments.  With `has_null`, its weights can sum to less than 1."""

    name: str
    function: Callable[..., tuple[Tensor, Tensor]]
    has_null: bool
    arguments: dict[str, float]


def normalize(
    scores: Tensor,
    normalizer: str | dict[str, Any] | TokenNormalizer,
    *,
    mask: Tensor | None = None,
    null_logit: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor]:
    """Turn `scores` into weights over the last axis.

    Args:
        scores: `[..., n]` logits, floating point; the computation uses their dtype.
        normalizer: one of `NORMALIZERS` or a registered name; or a mapping of its `name` and
            arguments, as `{"name": "clipped_softmax", "alpha": 3, "length": 256}`.
        mask: boolean, broadcastable to `scores`; False sets a weight to 0.
        null_logit: c of the normalizers in `WITH_NULL_LOGIT`, broadcastable to `scores[..., 0]`.

    Returns:
        The weights `[..., n]`, 0 where masked, and the null probability `[...]`, 1 if the whole row
        is masked.

    Raises:
        UserError: the name is unknown, or the normalizer does not take the arguments.
    """
    if not isinstance(normalizer, TokenNormalizer):
        normalizer = resolve_normalizer("normalizer", normalizer)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if scores.shape[-1] == 0 and normalizer.name not in WITH_NULL_LOGIT:
        return scores, 1 + scores.sum(-1)
    arguments: dict[str, Any] = dict(normalizer.arguments)
    if normalizer.name in WITH_NULL_LOGIT:
        arguments["null_logit"] = null_logit
    weights, null = normalizer.function(scores, **arguments)
    if normalizer.name in TOKEN_NORMALIZERS.own:
        return weights, null
    masked = scores == -torch.inf
    return weights.masked_fill(masked, 0), null.masked_fill(masked.all(-1), 1)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    return _softmax1(scores, -torch.inf)


def _softmax1(scores: Tensor, null_logit: float | Tensor) -> tuple[Tensor, Tensor]:
    fully_masked = (scores == -torch.inf).all(-1)
    c = torch.as_tensor(null_logit, dtype=scores.dtype, device=scores.device)
    c = c.expand(fully_masked.shape)
    return null_softmax(scores, c.masked_fill(fully_masked & (c == -torch.inf), 0))


def _key_null(
    scores: Tensor, null_logit: float | Tensor = 0.0, nulls: int = 1
) -> tuple[Tensor, Tensor]:
    """Softmax1: `null_logit` is the log-sum-exp over the logits of the null keys."""
    check_whole("nulls", nulls, 1, _MOST_NULLS)
    return _softmax1(scores, null_logit)


def _clipped_softmax(
    scores: Tensor,
    gamma: float | None = None,
    alpha: float | None = None,
    length: float | None = None,
) -> tuple[Tensor, Tensor]:
    if (gamma is None) == (alpha is None) or (alpha is None) != (length is None):
        raise UserError("clipped_softmax: it needs either 'gamma', or 'alpha' and 'length'")
    if gamma is None:
        assert alpha is not None
        assert length is not None
        if not (alpha > 0 and length >= 1):
            raise UserError(
                f"alpha, length: {alpha!r}, {length!r} must be above 0 and at least 1 (tokens)"
            )
        gamma = -alpha / length
    if not gamma < 0:
        raise UserError(f"gamma: {gamma!r} is not below 0, so nothing is clipped")
    weights = ((1 - gamma) * _softmax(scores)[0] + gamma).clamp(0, 1)
    weights = weights.masked_fill(scores == -torch.inf, 0)
    return weights, (1 - weights.sum(-1)).clamp(min=0)


def _sigmoid(scores: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sigmoid(scores), (scores == -torch.inf).all(-1).to(scores.dtype)


def null_softmax(scores: Tensor, null_logit: float | Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis and one more logit c: `(weights, null)`.

    The joint softmax subtracts max(c, max scores).  If it subtracted max(scores) only, exp(c) would
    overflow on very negative rows, and rows of -inf would give NaN.
    """
    largest = torch.finfo(scores.dtype).max  # replaces inf, for which inf - inf would be NaN
    if not isinstance(null_logit, Tensor):
        joint = F.pad(scores, (0, 1), value=min(null_logit, largest)).softmax(-1)
    else:
        column = null_logit.to(scores.dtype).clamp(max=largest)
        column = column.expand(scores.shape[:-1]).unsqueeze(-1)
        joint = torch.cat([scores, column], -1).softmax(-1)
    return joint[..., :-1], joint[..., -1]


def _softpick(scores: Tensor) -> tuple[Tensor, Tensor]:
    # e^x - 1, with both terms scaled by e^-shift.  Masked keys contribute to neither sum.
    visible = scores > -torch.inf
    shift = scores.amax(-1, keepdim=True).clamp(min=0).detach()
    signed = torch.where(visible, torch.exp(scores - shift) - torch.exp(-shift), 0)
    positive, negative = signed.clamp(min=0), signed.clamp(max=0).neg().sum(-1)
    total = positive.sum(-1) + negative
    empty = total == 0
    total = total.masked_fill(empty, 1)
    return positive / total.unsqueeze(-1), (negative / total).masked_fill(empty, 1)


def _sparsemax(scores: Tensor) -> tuple[Tensor, Tensor]:
    return _entmax(scores, "sparsemax")


def _entmax15(scores: Tensor) -> tuple[Tensor, Tensor]:
    return _entmax(scores, "entmax15")


def _entmax(scores: Tensor, name: str) -> tuple[Tensor, Tensor]:
    # Not `import entmax`: transformers requires all that the code next to a model imports.
    entmax = import_module("entmax")
    masked = scores == -torch.inf
    finite = scores.clamp(min=torch.finfo(scores.dtype).min / 4)
    weights = getattr(entmax, name)(finite, dim=-1).masked_fill(masked, 0)
    return weights, masked.all(-1).to(scores.dtype)


LEARNED_NULL_KEY = ("key_null", "key_value_null")
"""Normalizers whose null has a learned key."""
LEARNED_NULL_VALUE = ("value_null", "key_value_null")
"""Normalizers whose null has a learned value."""
LEARNED_NULL_LOGIT = ("learned_sink", "value_null", *LEARNED_NULL_KEY)
"""Normalizers whose null logit is a parameter."""
WITH_NULL_LOGIT = ("softmax1", *LEARNED_NULL_LOGIT)
"""Normalizers with a null logit; the fused kernels compute these and softmax."""
NEED_ENTMAX = ("sparsemax", "entmax15")
"""Normalizers that are computed by the package entmax."""
_LARGEST = 1e6  # largest absolute value of an argument
_MOST_NULLS = 64
_HAS_NULL = {*WITH_NULL_LOGIT, "clipped_softmax", "softpick"}
TOKEN_NORMALIZERS = Registry(
    "token_normalizer",
    {
        "softmax": _softmax,
        "softmax1": _softmax1,
        "learned_sink": _softmax1,
        "value_null": _softmax1,
        "key_null": _key_null,
        "key_value_null": _key_null,
        "clipped_softmax": _clipped_softmax,
        "softpick": _softpick,
        "sparsemax": _sparsemax,
        "entmax15": _entmax15,
    },
)
_RESOLVED: dict[tuple[str, tuple[tuple[str, float], ...]], TokenNormalizer] = {}
NORMALIZERS = (*TOKEN_NORMALIZERS, "sigmoid")
"""The names of the library; `sigmoid` is only for attention over depth."""


def register_token_normalizer(
    name: str, function: Callable[..., tuple[Tensor, Tensor]], *, has_null: bool
) -> None:
    """Add `name` to the values of `OasisConfig.token_normalizer`.

    Attention with this normalizer has no fused kernel; it stores the whole attention map.

    Args:
        name: letters, digits and `_`; not a name of the library.
        function: maps logits `[..., n]`, -inf where masked, to weights `[..., n]` and the null
            probability `[...]`.  Its other parameters are numbers that the configuration sets.
        has_null: whether null signals can use the null probability.

    Raises:
        UserError: `name` is not valid or is a name of the library, or `function` is not callable.
    """
    if isinstance(function, type | torch.nn.Module):
        raise UserError(
            "token_normalizer: a module or a class cannot be registered, only a function"
        )
    TOKEN_NORMALIZERS.register(name, function)
    (_HAS_NULL.add if has_null else _HAS_NULL.discard)(name)
    _RESOLVED.clear()


def with_null() -> list[str]:
    """Names of the normalizers that have a null."""
    return [name for name in TOKEN_NORMALIZERS if name in _HAS_NULL]


def resolve_normalizer(argument: str, value: str | dict[str, Any]) -> TokenNormalizer:
    """The normalizer that `value` names, with its arguments.

    Raises:
        UserError: the value is not valid; the message names `argument` and the allowed values.
    """
    given: dict[str, Any] = dict(value) if isinstance(value, dict) else {"name": value}
    name: Any = given.pop("name", None)
    if argument == "token_normalizer":
        TOKEN_NORMALIZERS.check(name)
    else:
        check_choice(argument, name, (*TOKEN_NORMALIZERS, "sigmoid"))
    for argument_name, number in given.items():
        if not isinstance(argument_name, str):
            raise UserError(f"{argument}: {argument_name!r} is not the name of an argument")
        check_at_least(f"{argument}: {argument_name}", number, -_LARGEST, _LARGEST)
    key = name, tuple(sorted(given.items()))
    if key not in _RESOLVED:  # cached: models resolve it in each forward pass
        _RESOLVED[key] = _resolved(argument, name, given)
    return _RESOLVED[key]


def with_length(value: Any, length: int) -> Any:
    """A normalizer as given, and with the default `length` if it has an `alpha` without one."""
    if isinstance(value, dict) and "alpha" in value and "length" not in value:
        return value | {"length": length}
    return value


def _resolved(argument: str, name: str, arguments: dict[str, float]) -> TokenNormalizer:
    function = _sigmoid if name == "sigmoid" else TOKEN_NORMALIZERS[name]
    taken = [
        parameter
        for parameter in list(inspect.signature(function).parameters.values())[1:]
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    names = [parameter.name for parameter in taken if parameter.name != "null_logit"]
    needed = [parameter.name for parameter in taken if parameter.default is parameter.empty]
    for key in arguments:
        if key not in names:
            allowed = f"takes {', '.join(names)}" if names else "takes no arguments"
            raise UserError(f"{argument}: {key!r} is not for {name!r}, which {allowed}")
    for key in needed:
        if key not in arguments and key != "null_logit":
            example = f'{{"name": "{name}", "{key}": ...}}'
            raise UserError(f"{argument}: {name!r} needs {key!r}; give {example}")
    if names:
        function(torch.zeros(1, 2), **arguments)  # raises for unsupported values
    return TokenNormalizer(name, function, name in _HAS_NULL, arguments)
