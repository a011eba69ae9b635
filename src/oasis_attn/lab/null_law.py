"""The constant null logit from which on a trained model has no sink: its threshold c*.

`crossing` defines c* of one seed, `next_logits` chooses the null logits to train with, and
`fit_line` fits c* = a + b log(length).

`logit_gradients` shows why there is a threshold.  At an idle query, let p be the weights, p_null
the null probability, u_j = (x_j W_V) W_O, and o = sum_j p_j u_j the output.  The target is 0, so
the loss is |o|^2 / 2, and its gradient with respect to logit j is g_j = p_j (o . u_j - |o|^2).  So

    -g_0                     = p_0 (|o|^2 - o . u_0)                  raises the first logit
    sum over j >= 1 of g_j   = (p_0 + p_null) |o|^2 - p_0 o . u_0     lowers the others together

The others are always lowered if o . u_0 <= |o|^2, and the first logit is raised if and only if
o . u_0 < |o|^2.  While all logits are near 0, o = (1 - p_null) m with the mean m of the values, so
the first logit is raised if and only if

    (m . u_0) / |m|^2  <  1 - p_null

Without a null, a first token whose value is a little below the mean becomes the sink, and its own
gradient then brings its value to 0.  With a null that holds most of the weight, the first token is
lowered with the others instead, unless its value is already small.  At the start, log-sum-exp of n
visible keys is log(n), and p_null = e^c / (e^c + n): it is above one half if c > log(n).

Where the first logit is raised, Adam gives both movements about the same speed.  If they have come
to a and -a, the n - 1 others hold (n - 1) e^-a / (e^a + e^c) of the weight.  If they stop where
this is some small e, then sink and null are equal at c = a = log((n - 1) / 2 e) / 2.  So the
threshold of probability 1/2 is expected to grow like log(n) / 2, and that of an absent sink, by the
condition above, like log(n).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy import stats

from oasis_attn.data.trigger import FIRST, TriggerTask
from oasis_attn.lab.attention_only import AttentionOnlyModels

_SMALLEST = 1e-12


def crossing(sinks: Mapping[float, float], level: float) -> float | None:
    """c*: from here on, all larger null logits have a sink below `level`.

    Args:
        sinks: null logit -> first-token probability at idle queries, of one seed.
        level: of the probability.

    Returns:
        The null logit, interpolated linearly in log(p / (1 - p)) between the largest with p at
        least `level` and the next; None if one of the two was not trained.
    """
    logits = sorted(sinks)
    above = [index for index, c in enumerate(logits) if sinks[c] >= level]
    if not above or above[-1] == len(logits) - 1:
        return None
    low, high = logits[above[-1]], logits[above[-1] + 1]
    odds_low, odds_high = _log_odds(sinks[low]), _log_odds(sinks[high])
    share = (odds_low - _log_odds(level)) / (odds_low - odds_high)
    return low + share * (high - low)


def _log_odds(p: float) -> float:
    p = min(max(p, _SMALLEST), 1 - _SMALLEST)
    return math.log(p / (1 - p))


def next_logits(
    sinks: Mapping[float, float],
    levels: Sequence[float],
    *,
    spacing: float,
    resolution: float,
    limits: tuple[float, float],
) -> set[float]:
    """The null logits to train next for one seed; empty if all thresholds are known well enough.

    A level that no trained null logit is above or below gets another one at the distance `spacing`;
    else the bracket of the threshold is halved until it is at most `resolution` wide.  No null
    logit is outside `limits`.
    """
    logits = sorted(sinks)
    chosen = set()
    for level in levels:
        above = [index for index, c in enumerate(logits) if sinks[c] >= level]
        if not above:
            chosen.add(logits[0] - spacing)
        elif above[-1] == len(logits) - 1:
            chosen.add(logits[-1] + spacing)
        else:
            low, high = logits[above[-1]], logits[above[-1] + 1]
            if high - low > resolution:
                chosen.add((low + high) / 2)
    return {c for c in chosen if limits[0] <= c <= limits[1]}


@dataclass(frozen=True, kw_only=True)
class LineFit:
    """Least squares y = intercept + slope x, with 95 % intervals from Student's t."""

    slope: float
    slope_interval: tuple[float, float]
    intercept: float
    intercept_interval: tuple[float, float]
    n: int


def fit_line(x: Sequence[float], y: Sequence[float]) -> LineFit:
    """Fit a line to at least three points."""
    found = stats.linregress(x, y)
    width = stats.t.ppf(0.975, len(x) - 2)
    slope, intercept = float(found.slope), float(found.intercept)
    slope_error, intercept_error = width * found.stderr, width * found.intercept_stderr
    return LineFit(
        slope=slope,
        slope_interval=(float(slope - slope_error), float(slope + slope_error)),
        intercept=intercept,
        intercept_interval=(
            float(intercept - intercept_error),
            float(intercept + intercept_error),
        ),
        n=len(x),
    )


@dataclass(frozen=True, kw_only=True)
class LogitGradients:
    """Means over idle queries for a model of one layer and one head.

    Attributes:
        first, null: p_0 and p_null.
        output: |o|^2.
        first_value: o . u_0; the first logit is raised if it is below `output`.
        raise_first: -g_0, by autograd.
        lower_others: sum over j >= 1 of g_j, by autograd.
        raise_first_expected, lower_others_expected: the same by the equations above.
        first_logit, other_logit: the logit of the first token, and the mean one of the others.
        lse: log-sum-exp of the logits of the keys.
    """

    first: float
    null: float
    output: float
    first_value: float
    raise_first: float
    lower_others: float
    raise_first_expected: float
    lower_others_expected: float
    first_logit: float
    other_logit: float
    lse: float


def logit_gradients(
    model: AttentionOnlyModels, task: TriggerTask, generator: torch.Generator, size: int = 128
) -> LogitGradients:
    """The gradients of half the squared output at idle queries, by autograd on the logits."""
    batch = task.batch(size, generator)
    x_BTN, idle_BT = batch.x_BTN, batch.idle_BT
    with torch.no_grad():
        key_BSN = x_BTN @ model.key[0, 0]
        value_BSN = x_BTN @ model.value[0, 0] @ model.output[0, 0]
        scores_BTS = (x_BTN @ model.query[0, 0]) @ key_BSN.mT
        mask_TS = torch.ones(task.length, task.length, dtype=torch.bool).tril()
        first_logit_BT = scores_BTS[..., FIRST]
        others_BT = (scores_BTS * mask_TS)[..., 1:].sum(-1)
        other_logit_BT = others_BT / torch.arange(task.length).clamp(min=1)
        scores_BTS = scores_BTS.masked_fill(~mask_TS, -torch.inf)
        lse_BT = scores_BTS.logsumexp(-1)
    scores_BTS.requires_grad_()
    total_BT = torch.logaddexp(scores_BTS.logsumexp(-1), model.null_logit[0, 0])
    weights_BTS = (scores_BTS - total_BT.unsqueeze(-1)).exp()
    output_BTN = weights_BTS @ value_BSN
    half_BT = output_BTN.square().sum(-1) / 2
    (gradient_BTS,) = torch.autograd.grad(half_BT[idle_BT].sum(), scores_BTS)
    with torch.no_grad():
        gradient_QS, first_Q = gradient_BTS[idle_BT], weights_BTS[idle_BT][:, FIRST]
        null_Q = (model.null_logit[0, 0] - total_BT[idle_BT]).exp()
        output_Q = 2 * half_BT[idle_BT]
        first_value_Q = (output_BTN * value_BSN[:, FIRST, None]).sum(-1)[idle_BT]
        values = {
            "first": first_Q,
            "null": null_Q,
            "output": output_Q,
            "first_value": first_value_Q,
            "raise_first": -gradient_QS[:, FIRST],
            "lower_others": gradient_QS[:, 1:].sum(-1),
            "raise_first_expected": first_Q * (output_Q - first_value_Q),
            "lower_others_expected": (first_Q + null_Q) * output_Q - first_Q * first_value_Q,
            "first_logit": first_logit_BT[idle_BT],
            "other_logit": other_logit_BT[idle_BT],
            "lse": lse_BT[idle_BT],
        }
        return LogitGradients(**{name: float(value.mean()) for name, value in values.items()})
