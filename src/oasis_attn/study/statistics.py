"""Statistics of paired values.  Axis: C conditions (one corpus, size and seed each)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from scipy import stats
from scipy.special import gammaln

from oasis_attn.errors import UserError, check_choice

SCALES = ("ratio", "points", "difference")
LEVEL = 0.95
MIN_PAIRS = 6
"""An interval or a standard deviation of fewer pairs says little."""
MIN_PAIRS_EQUIVALENCE = 10
"""Fewer pairs are not tested for equivalence."""
_DRAWS = 9_999
_SEED = 0
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A variant compared with a baseline in the same conditions.

    Attributes:
        n: number of conditions, that is, of pairs.
        mean, baseline_mean: means over the conditions; geometric means on the scale `ratio`.
        difference: mean of the paired differences, of logarithms on the scale `ratio`.
        change: relative change from the baseline: 0.1 is 10 % more; NaN if the baseline's mean is
            0 or a value is not finite.  The difference itself on the scale `difference`.
        low, high: bootstrap interval of `change` at `LEVEL`; NaN for a single pair.
        effect_size: Hedges' g of the paired differences; NaN for fewer than `MIN_PAIRS`.
        p: two-sided p-value of the paired t-test on the same differences; NaN for a single pair.
        p_equivalence: p-value of the test that the difference is smaller than a margin; NaN without
            a margin, and for fewer than `MIN_PAIRS_EQUIVALENCE`.
    """

    n: int
    mean: float
    baseline_mean: float
    difference: float
    change: float
    low: float
    high: float
    effect_size: float
    p: float
    p_equivalence: float = math.nan


def compare(
    values_C: Sequence[float],
    baseline_C: Sequence[float],
    scale: str,
    margin: float | None = None,
) -> Comparison:
    """Compare paired values.

    Args:
        values_C, baseline_C: the metric in each condition; entries at one index form a pair.
        scale: `ratio` for positive quantities that vary in proportion (perplexity, norms): the
            change is exp(mean log ratio) - 1, so that no condition with large values dominates.
            `points` for fractions and quantities that may be 0 or negative: the change is the
            difference of the means over the absolute mean of the baseline.  `difference` for
            slopes: the change is the difference of the means.
        margin: the smallest change that matters, for `p_equivalence`; see `bound`.

    Raises:
        UserError: no values, unequal lengths, an unknown scale, or values <= 0 with `ratio`.
    """
    check_choice("scale", scale, SCALES)
    x_C, y_C = np.asarray(values_C, dtype=float), np.asarray(baseline_C, dtype=float)
    if x_C.shape != y_C.shape or x_C.ndim != 1 or not len(x_C):
        raise UserError(f"values: shapes {x_C.shape} and {y_C.shape} cannot be paired")
    if scale == "ratio" and (min(x_C.min(), y_C.min()) <= 0):
        raise UserError("scale: 'ratio' requires values above 0; use 'points'")
    nan, change, low, high = math.nan, math.nan, math.nan, math.nan
    if not (np.isfinite(x_C).all() and np.isfinite(y_C).all()):
        return Comparison(
            n=len(x_C), mean=float(x_C.mean()), baseline_mean=float(y_C.mean()), difference=nan,
            change=nan, low=nan, high=nan, effect_size=nan, p=nan,
        )  # fmt: skip
    if scale == "ratio":
        difference_C = np.log(x_C) - np.log(y_C)
        mean, baseline_mean = (float(np.exp(np.log(z_C).mean())) for z_C in (x_C, y_C))
        change = math.expm1(difference_C.mean())
        low, high = np.expm1(bootstrap_interval(difference_C))
    else:
        difference_C = x_C - y_C
        mean, baseline_mean = float(x_C.mean()), float(y_C.mean())
        if scale == "difference":
            change = float(difference_C.mean())
            low, high = bootstrap_interval(difference_C)
        elif baseline_mean:
            change = (mean - baseline_mean) / abs(baseline_mean)
            low, high = bootstrap_interval(x_C, y_C)
    return Comparison(
        n=len(x_C),
        mean=mean,
        baseline_mean=baseline_mean,
        difference=float(difference_C.mean()),
        change=change,
        low=float(low),
        high=float(high),
        effect_size=hedges_g(difference_C),
        p=paired_p(difference_C),
        p_equivalence=nan if margin is None else equivalence_p(difference_C, bound(margin, scale)),
    )


def bound(margin: float, scale: str) -> float:
    """The margin in the units of the paired differences.

    On the scale `ratio` a margin m stands for ratios from 1 / (1 + m) to 1 + m, so that it is the
    same whichever of the two is the baseline; on other scales it is an absolute difference.
    """
    return math.log1p(margin) if scale == "ratio" else margin


def exceeds(comparison: Comparison, noise_floor: float, scale: str) -> bool:
    """Whether a change is larger than a noise floor of `noise_floor`; False if one is NaN.

    On the scale `ratio` both are factors: a floor of 1 is a factor of 2, which a fall by more than
    half exceeds, as a rise to more than the double does.
    """
    if scale == "ratio":
        return abs(comparison.difference) > bound(noise_floor, scale)
    return abs(comparison.change) > noise_floor


def log_slope(x_S: Sequence[float], y_S: Sequence[float]) -> float:
    """Slope of the least-squares line through (log x, log y): y grows as x to this power.

    NaN if a value is not finite or not above 0.  At least two different x are required.
    """
    if not all(math.isfinite(value) and value > 0 for value in (*x_S, *y_S)):
        return math.nan
    return float(np.polyfit(np.log(x_S), np.log(y_S), 1)[0])


def bootstrap_interval(x_C: np.ndarray, y_C: np.ndarray | None = None) -> tuple[float, float]:
    """Interval at `LEVEL` of mean(x), or of mean(x - y) / |mean(y)| for pairs: BCa (Efron 1987).

    Pairs are resampled.  Where BCa is not defined (all values are equal), it is the percentile
    interval of the resamples whose baseline is not 0; NaN for a single pair.
    """
    return _bootstrap_interval(tuple(x_C.tolist()), None if y_C is None else tuple(y_C.tolist()))


@lru_cache(maxsize=8192)  # the tables, figures and sentences of a report show the same intervals
def _bootstrap_interval(xs: tuple[float, ...], ys: tuple[float, ...] | None) -> tuple[float, float]:
    x_C, y_C = np.array(xs), None if ys is None else np.array(ys)
    if len(x_C) < 2:
        return math.nan, math.nan

    def ratio(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (x.mean(axis) - y.mean(axis)) / np.abs(y.mean(axis))

    data, statistic = ((x_C,), np.mean) if y_C is None else ((x_C, y_C), ratio)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # the result is then NaN
        found = stats.bootstrap(
            data, statistic, paired=True, vectorized=True, n_resamples=_DRAWS,
            confidence_level=LEVEL, method="BCa", rng=np.random.default_rng(_SEED),
        )  # fmt: skip
    low, high = found.confidence_interval
    if not (math.isfinite(low) and math.isfinite(high)):
        drawn = found.bootstrap_distribution
        drawn = drawn[np.isfinite(drawn)]
        if not len(drawn):
            return math.nan, math.nan
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def hedges_g(difference_C: np.ndarray) -> float:
    """Mean over standard deviation of paired differences, times Hedges' exact correction.

    g = J(n - 1) mean / s, J(m) = Gamma(m/2) / (sqrt(m/2) Gamma((m - 1)/2)) (Hedges 1981), the
    paired form, g_z.  It is 0 if all differences are 0, infinite if all are equal and not 0, and
    NaN for fewer than `MIN_PAIRS`, because so few pairs hardly determine a standard deviation.
    """
    m = len(difference_C) - 1
    if len(difference_C) < MIN_PAIRS:
        return math.nan
    mean, deviation = float(np.mean(difference_C)), _deviation(difference_C)
    if not deviation:
        return math.copysign(math.inf, mean) if mean else 0.0
    correction = math.exp(gammaln(m / 2) - gammaln((m - 1) / 2)) / math.sqrt(m / 2)
    return correction * mean / deviation


def equivalence_p(difference_C: np.ndarray, bound: float) -> float:
    """p-value of the hypothesis that the mean difference is not between -bound and bound.

    Two one-sided paired t-tests (TOST; Schuirmann 1987): the larger of their p-values.  If it is
    below alpha, the interval at the level 1 - 2 alpha lies within the bounds.  NaN for fewer than
    `MIN_PAIRS_EQUIVALENCE` differences.
    """
    if len(difference_C) < MIN_PAIRS_EQUIVALENCE:
        return math.nan
    if not _deviation(difference_C):
        return 0.0 if abs(np.mean(difference_C)) < bound else 1.0
    above = stats.ttest_1samp(difference_C, -bound, alternative="greater").pvalue
    below = stats.ttest_1samp(difference_C, bound, alternative="less").pvalue
    return float(max(above, below))


def paired_p(difference_C: np.ndarray) -> float:
    """Two-sided p-value of the t-test that the mean difference is 0; NaN for a single pair."""
    if len(difference_C) < 2:
        return math.nan
    if not _deviation(difference_C):
        return 0.0 if np.mean(difference_C) else 1.0
    return float(stats.ttest_1samp(difference_C, 0.0).pvalue)


def _deviation(difference_C: np.ndarray) -> float:
    """Standard deviation; 0 if the differences are equal up to rounding."""
    deviation = float(np.std(difference_C, ddof=1))
    return deviation if deviation > _ROUNDING * abs(float(np.mean(difference_C))) else 0.0


def holm(p: Iterable[float]) -> list[float]:
    """p-values with Holm's correction (Holm 1979); NaN values stay NaN and do not count."""
    values = list(p)
    order = sorted(
        (i for i, value in enumerate(values) if not math.isnan(value)), key=values.__getitem__
    )
    corrected, least = list(values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * values[index]))
        corrected[index] = least
    return corrected


def noise_floor(repeats: Iterable[Sequence[float]], scale: str) -> tuple[float, int]:
    """The relative change of a metric that a different seed causes, and the number of pairs used.

    It is the root mean square (rms) of the change between any two runs that differ only in their
    seed: exp(rms of the log ratio) - 1 for `ratio`, rms of difference / mean for `points`.

    Args:
        repeats: groups of values of runs that differ only in their seed.
        scale: see `compare`.
    """
    check_choice("scale", scale, SCALES)
    squares = []
    for group in repeats:
        mean = float(np.mean(group)) if len(group) else math.nan
        for a, b in combinations(group, 2):
            if scale == "ratio":
                defined = a > 0 and b > 0 and math.isfinite(a) and math.isfinite(b)
                squares.append(math.log(a / b) ** 2 if defined else math.nan)
            else:
                squares.append(((a - b) / mean) ** 2 if mean else (0.0 if a == b else math.nan))
    if not squares or not all(map(math.isfinite, squares)):
        return math.nan, len(squares)
    root = math.sqrt(float(np.mean(squares)))
    return (math.expm1(root) if scale == "ratio" else root), len(squares)
