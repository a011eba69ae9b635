"""Statistics of paired values.  Axis: C conditions (one corpus, size and seed each)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats
from scipy.special import gammaln

from oasis_attn.errors import UserError, check_choice

SCALES = ("ratio", "points")
LEVEL = 0.95
_DRAWS = 9_999
_SEED = 0
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A variant compared with a baseline in the same conditions.

    Attributes:
        n: number of conditions, that is, of pairs.
        mean, baseline_mean: means over the conditions; geometric means on the scale `ratio`.
        change: relative change from the baseline: 0.1 is 10 % more; NaN if the baseline's mean is
            0 or a value is not finite.
        low, high: bootstrap interval of `change` at `LEVEL`; NaN for a single pair.
        effect_size: Hedges' g of the paired differences (of logarithms on the scale `ratio`).
        p: two-sided p-value of the paired t-test on the same differences; NaN for a single pair.
    """

    n: int
    mean: float
    baseline_mean: float
    change: float
    low: float
    high: float
    effect_size: float
    p: float


def compare(values_C: Sequence[float], baseline_C: Sequence[float], scale: str) -> Comparison:
    """Compare paired values.

    Args:
        values_C, baseline_C: the metric in each condition; entries at one index form a pair.
        scale: `ratio` for positive quantities that vary in proportion (perplexity, norms): the
            change is exp(mean log ratio) - 1, so that no condition with large values dominates.
            `points` for fractions and quantities that may be 0 or negative: the change is the
            difference of the means over the absolute mean of the baseline.

    Raises:
        UserError: no values, unequal lengths, an unknown scale, or values <= 0 with `ratio`.
    """
    check_choice("scale", scale, SCALES)
    x_C, y_C = np.asarray(values_C, dtype=float), np.asarray(baseline_C, dtype=float)
    if x_C.shape != y_C.shape or x_C.ndim != 1 or not len(x_C):
        raise UserError(f"values: shapes {x_C.shape} and {y_C.shape} cannot be paired")
    if scale == "ratio" and (min(x_C.min(), y_C.min()) <= 0):
        raise UserError("scale: 'ratio' requires values above 0; use 'points'")
    n = len(x_C)
    if not (np.isfinite(x_C).all() and np.isfinite(y_C).all()):
        nan = math.nan
        means = (float(x_C.mean()), float(y_C.mean()))
        return Comparison(
            n=n, mean=means[0], baseline_mean=means[1], change=nan, low=nan, high=nan,
            effect_size=nan, p=nan,
        )  # fmt: skip
    if scale == "ratio":
        difference_C = np.log(x_C) - np.log(y_C)
        mean, baseline_mean = (float(np.exp(np.log(z_C).mean())) for z_C in (x_C, y_C))
        change = math.expm1(difference_C.mean())
        low, high = np.expm1(bootstrap_interval(difference_C))
    else:
        difference_C = x_C - y_C
        mean, baseline_mean = float(x_C.mean()), float(y_C.mean())
        change = (mean - baseline_mean) / abs(baseline_mean) if baseline_mean else math.nan
        low, high = bootstrap_interval(x_C, y_C) if baseline_mean else (math.nan, math.nan)
    return Comparison(
        n=n,
        mean=mean,
        baseline_mean=baseline_mean,
        change=change,
        low=float(low),
        high=float(high),
        effect_size=hedges_g(difference_C),
        p=paired_p(difference_C),
    )


def bootstrap_interval(x_C: np.ndarray, y_C: np.ndarray | None = None) -> tuple[float, float]:
    """Interval at `LEVEL` of mean(x), or of mean(x - y) / |mean(y)| for pairs: BCa (Efron 1987).

    Pairs are resampled.  Where BCa is not defined (all values are equal), it is the percentile
    interval of the resamples whose baseline is not 0; NaN for a single pair.
    """
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
    NaN for a single pair.
    """
    m = len(difference_C) - 1
    if m < 1:
        return math.nan
    mean, deviation = float(np.mean(difference_C)), _deviation(difference_C)
    if not deviation:
        return math.copysign(math.inf, mean) if mean else 0.0
    if m == 1:
        return 0.0  # J(1) = 0: two pairs do not determine a standard deviation
    correction = math.exp(gammaln(m / 2) - gammaln((m - 1) / 2)) / math.sqrt(m / 2)
    return correction * mean / deviation


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
