"""The bar for a variant: what it must reach to be worth its change, beside what is compared.

A variant that cures sinks should have no more of them than the simplest cures, no more outliers,
survive eight and four bits, and not pay for that with its loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from oasis_attn.study.measures import Measure, measures
from oasis_attn.study.results import Results
from oasis_attn.study.statistics import compare

RIVALS = ("gated_attention", "softpick")
COSTS = {"w8a8-static": 0.02, "w4a4": 0.15}
RULE = (
    f"The bar: sink rate and kurtosis at most those of {' and of '.join(RIVALS)}; perplexity under "
    + " and under ".join(f"{scheme} at most {most:.0%}" for scheme, most in COSTS.items())
    + " above the same model's own; perplexity above the reference's by at most the noise floor. "
    "A hurdle is met if the change, over all units, is at most its limit, and met for certain if "
    "its whole interval is."
)


@dataclass(frozen=True, kw_only=True)
class Hurdle:
    """One requirement on one row.

    Attributes:
        row: of the plan.
        text: what is compared with what.
        n: units that have both; 0 where the study has none yet.
        change: of the row, relative; NaN from no unit.
        low, high: its bootstrap interval.
        limit: the largest change that meets it.
    """

    row: str
    text: str
    n: int
    change: float
    low: float
    high: float
    limit: float

    @property
    def outcome(self) -> str:
        """`met`, `met for certain`, `missed`, or `untested`."""
        if not self.n or math.isnan(self.limit):
            return "untested"
        if not self.change <= self.limit:
            return "missed"
        return "met for certain" if self.high <= self.limit else "met"


def bar(results: Results, row: str) -> list[Hurdle]:
    """Every hurdle for one row of the plan."""
    known = {measure.name: measure for measure in measures(results.plan.schemes)}
    perplexity = known["perplexity.windowed"]
    found = [
        _against(results, known[name], row, rival, 0.0)
        for name in ("sink.rate@0.3", "outlier.avg_kurtosis")
        for rival in RIVALS
    ]
    for scheme, most in COSTS.items():
        if scheme in results.plan.schemes:
            found.append(
                _cost(results, perplexity, known[f"{perplexity.name}@{scheme}"], row, most)
            )
    floor, _ = results.floor(perplexity)
    found.append(_against(results, perplexity, row, results.plan.reference, floor))
    return found


def _against(results: Results, measure: Measure, row: str, rival: str, limit: float) -> Hurdle:
    text = f"{measure.head} against {rival}"
    values, others = results.values(measure, row), results.values(measure, rival)
    return _hurdle(row, text, values, others, measure.scale, limit)


def _cost(results: Results, plain: Measure, low_bit: Measure, row: str, limit: float) -> Hurdle:
    values, others = results.values(low_bit, row), results.values(plain, row)
    return _hurdle(row, f"{low_bit.head} against its own", values, others, plain.scale, limit)


def _hurdle(row, text, values, others, scale: str, limit: float) -> Hurdle:
    units = [unit for unit in values if unit in others]
    if not units:
        nan = math.nan
        return Hurdle(row=row, text=text, n=0, change=nan, low=nan, high=nan, limit=limit)
    subject, baseline = ([table[unit] for unit in units] for table in (values, others))
    if scale == "points" and not any(baseline):
        change = low = high = 0.0 if not any(subject) else math.inf
    else:
        seen = compare(subject, baseline, scale)
        change, low, high = seen.change, seen.low, seen.high
    return Hurdle(row=row, text=text, n=len(units), change=change, low=low, high=high, limit=limit)
