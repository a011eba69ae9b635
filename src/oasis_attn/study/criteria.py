"""The acceptance criteria: what a variant must reach before the study recommends it.

A variant that removes attention sinks should have sink rates and kurtosis no higher than the
simplest known remedies, a small loss of quality at eight and four bits, and an unquantized
perplexity no worse than that of the reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from oasis_attn.study.results import Results
from oasis_attn.study.statistics import compare
from oasis_attn.study.study_metrics import StudyMetric, study_metrics

REMEDIES = ("gated_attention", "softpick")
"""Variants of the literature that remove sinks; a candidate is compared with each."""
LARGEST_INCREASE = {"w8a8-static": 0.02, "w4a4": 0.15}
"""For each scheme: the largest accepted increase of perplexity by quantization, relative."""
RULE = (
    "Acceptance criteria: sink rate and kurtosis are at most those of "
    f"{' and of '.join(REMEDIES)}; "
    + "; ".join(
        f"{scheme} increases the model's perplexity by at most {largest:.0%}"
        for scheme, largest in LARGEST_INCREASE.items()
    )
    + "; perplexity exceeds that of the reference by at most the noise floor. "
    "A criterion is met if the mean change over all conditions is at most the limit. It is marked "
    "`whole interval` if the upper end of the interval is at most the limit, too."
)

MET_WHOLE_INTERVAL, MET, NOT_MET, NOT_TESTED = (
    "met (whole interval)",
    "met",
    "not met",
    "not tested",
)


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One criterion, applied to one variant.

    Attributes:
        variant: name of the variant in the plan.
        text: what is compared with what.
        n: number of conditions with both values; 0 if the study has none yet.
        change: relative change of the variant; NaN if `n` is 0.
        low, high: bootstrap interval of `change`.
        limit: the largest change that meets the criterion.
    """

    variant: str
    text: str
    n: int
    change: float
    low: float
    high: float
    limit: float

    @property
    def outcome(self) -> str:
        """`met (whole interval)`, `met`, `not met` or `not tested`; see `RULE`."""
        if not self.n or math.isnan(self.limit):
            return NOT_TESTED
        if not self.change <= self.limit:
            return NOT_MET
        return MET_WHOLE_INTERVAL if self.high <= self.limit else MET


def check_criteria(results: Results, variant: str) -> list[Criterion]:
    """Apply every criterion to one variant of the plan."""
    known = {metric.name: metric for metric in study_metrics(results.plan.schemes)}
    perplexity = known["perplexity.windowed"]
    found = [
        _against(results, known[name], variant, remedy, 0.0)
        for name in ("sink.rate@0.3", "outlier.avg_kurtosis")
        for remedy in REMEDIES
    ]
    for scheme, largest in LARGEST_INCREASE.items():
        if scheme in results.plan.schemes:
            quantized = known[f"{perplexity.name}@{scheme}"]
            found.append(_quantized(results, perplexity, quantized, variant, largest))
    floor, _ = results.noise_floor(perplexity)
    found.append(_against(results, perplexity, variant, results.plan.reference, floor))
    return found


def _against(
    results: Results, metric: StudyMetric, variant: str, baseline: str, limit: float
) -> Criterion:
    text = f"{metric.label} against {baseline}"
    values, others = results.values(metric, variant), results.values(metric, baseline)
    return _criterion(variant, text, values, others, metric.scale, limit)


def _quantized(
    results: Results, plain: StudyMetric, quantized: StudyMetric, variant: str, limit: float
) -> Criterion:
    text = f"{quantized.label} against unquantized"
    values, others = results.values(quantized, variant), results.values(plain, variant)
    return _criterion(variant, text, values, others, plain.scale, limit)


def _criterion(variant, text, values, others, scale: str, limit: float) -> Criterion:
    conditions = [condition for condition in values if condition in others]
    n = len(conditions)
    change = low = high = math.nan
    if conditions:
        subject, baseline = ([table[each] for each in conditions] for table in (values, others))
        if scale == "points" and not any(baseline):
            # The relative change from 0 is not defined.
            change = low = high = 0.0 if not any(subject) else math.inf
        else:
            seen = compare(subject, baseline, scale)
            change, low, high = seen.change, seen.low, seen.high
    return Criterion(
        variant=variant, text=text, n=n, change=change, low=low, high=high, limit=limit
    )
