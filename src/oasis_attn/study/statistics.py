"""Paired statistics on arrays.  Axes: U units (a corpus, size and seed each), B baselines."""

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
    """A subject against a baseline in the same units.

    Attributes:
        n: units that have both.
        subject, baseline: their means over the units, geometric on the scale `ratio`.
        change: of the one against the other, relative: 0.1 is 10 % more; NaN where the baseline's
            mean is 0, or a value is not finite.
        low, high: bootstrap interval of `change` at `LEVEL`; NaN from a single unit.
        effect_size: Hedges' g of the paired differences (of logarithms on the scale `ratio`).
        p: two-sided, of the paired t-test on the same differences; NaN from a single unit.
    """

    n: int
    subject: float
    baseline: float
    change: float
    low: float
    high: float
    effect_size: float
    p: float


def compare(subject_U: Sequence[float], baseline_U: Sequence[float], scale: str) -> Comparison:
    """Pair the units and compare.

    Args:
        subject_U, baseline_U: the measure in each unit.
        scale: `ratio`, for measures above 0 that vary in proportion (perplexity, norms): the change
            is exp(mean log ratio) - 1, so that no unit of large values decides alone.  `points`,
            for shares and others that may be 0 or less: the change is that of the mean, relative
            to its size.

    Raises:
        UserError: no units, unequal lengths, an unknown scale, values of at most 0 as `ratio`.
    """
    check_choice("scale", scale, SCALES)
    x_U, y_U = np.asarray(subject_U, dtype=float), np.asarray(baseline_U, dtype=float)
    if x_U.shape != y_U.shape or x_U.ndim != 1 or not len(x_U):
        raise UserError(f"units: {x_U.shape} and {y_U.shape} do not pair")
    if scale == "ratio" and (min(x_U.min(), y_U.min()) <= 0):
        raise UserError("scale: 'ratio' needs values above 0; use 'points'")
    n = len(x_U)
    if not (np.isfinite(x_U).all() and np.isfinite(y_U).all()):
        nan = math.nan
        means = (float(x_U.mean()), float(y_U.mean()))
        return Comparison(
            n=n, subject=means[0], baseline=means[1], change=nan, low=nan, high=nan,
            effect_size=nan, p=nan,
        )  # fmt: skip
    if scale == "ratio":
        difference_U = np.log(x_U) - np.log(y_U)
        subject, baseline = (float(np.exp(np.log(z_U).mean())) for z_U in (x_U, y_U))
        change = math.expm1(difference_U.mean())
        low, high = np.expm1(bootstrap_interval(difference_U))
    else:
        difference_U = x_U - y_U
        subject, baseline = float(x_U.mean()), float(y_U.mean())
        change = (subject - baseline) / abs(baseline) if baseline else math.nan
        low, high = bootstrap_interval(x_U, y_U) if baseline else (math.nan, math.nan)
    return Comparison(
        n=n,
        subject=subject,
        baseline=baseline,
        change=change,
        low=float(low),
        high=float(high),
        effect_size=hedges_g(difference_U),
        p=paired_p(difference_U),
    )


def bootstrap_interval(x_U: np.ndarray, y_U: np.ndarray | None = None) -> tuple[float, float]:
    """Interval at `LEVEL` of mean(x), or of mean(x - y) / |mean(y)| for pairs: BCa (Efron 1987).

    Whole units are drawn.  The percentile interval stands in where BCa is not defined (values all
    equal, draws whose baseline is 0 left out); NaN from a single unit.
    """
    if len(x_U) < 2:
        return math.nan, math.nan

    def ratio(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (x.mean(axis) - y.mean(axis)) / np.abs(y.mean(axis))

    data, statistic = ((x_U,), np.mean) if y_U is None else ((x_U, y_U), ratio)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # told by NaN
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


def hedges_g(difference_U: np.ndarray) -> float:
    """Mean over standard deviation of paired differences, times Hedges' exact correction.

    g = J(n - 1) mean / s, J(m) = Gamma(m/2) / (sqrt(m/2) Gamma((m - 1)/2)) (Hedges 1981), the
    paired form, g_z.  0 where nothing differs, infinite where all differ alike; NaN from one unit.
    """
    m = len(difference_U) - 1
    if m < 1:
        return math.nan
    mean, deviation = float(np.mean(difference_U)), _deviation(difference_U)
    if not deviation:
        return math.copysign(math.inf, mean) if mean else 0.0
    if m == 1:
        return 0.0  # J(1) = 0: two units tell nothing of their own spread
    correction = math.exp(gammaln(m / 2) - gammaln((m - 1) / 2)) / math.sqrt(m / 2)
    return correction * mean / deviation


def paired_p(difference_U: np.ndarray) -> float:
    """Two-sided p of the t-test that the mean difference is 0; NaN from a single unit."""
    if len(difference_U) < 2:
        return math.nan
    if not _deviation(difference_U):
        return 0.0 if np.mean(difference_U) else 1.0
    return float(stats.ttest_1samp(difference_U, 0.0).pvalue)


def _deviation(difference_U: np.ndarray) -> float:
    """Standard deviation; 0 where the differences differ by rounding only."""
    deviation = float(np.std(difference_U, ddof=1))
    return deviation if deviation > _ROUNDING * abs(float(np.mean(difference_U))) else 0.0


def holm(p: Iterable[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979); those that are NaN stay so, uncounted."""
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
    """How much chance alone changes a measure, relative; and the number of pairs that say so.

    Root mean square of the change between any two runs that differ in their seed only: exp of that
    of the log ratio, less 1, for `ratio`; of the difference over the mean for `points`.

    Args:
        repeats: groups of runs alike but for the seed.
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
