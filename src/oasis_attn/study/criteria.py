"""Acceptance criteria of a plan: what a candidate must reach before the study recommends it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from oasis_attn.study.claim import FIXED, NOISE_FLOOR, REFERENCE, UNQUANTIZED, Criterion, Premise
from oasis_attn.study.plan import Condition, Plan
from oasis_attn.study.results import Results
from oasis_attn.study.statistics import MIN_PAIRS, bootstrap_interval, compare
from oasis_attn.study.study_metrics import StudyMetric, study_metrics

MET_WHOLE_INTERVAL, MET, NOT_MET, NOT_TESTED = (
    "met (whole interval)",
    "met",
    "not met",
    "not tested",
)
NOT_APPLICABLE = "not applicable"
_OUTCOMES = (
    "A criterion is met if the mean over all conditions reaches the limit. It is marked "
    f"`whole interval` if the whole interval, of at least {MIN_PAIRS} pairs, does. A criterion "
    "that does not apply cannot be failed, and is not counted as met."
)


@dataclass(frozen=True, kw_only=True)
class CriterionResult:
    """One criterion, applied to one variant.

    Attributes:
        variant: name of the variant in the plan.
        text: what is compared with what.
        n: number of conditions with both values; 0 if the study has none yet.
        change: relative change of the variant, or its mean value for a fixed limit; NaN if `n`
            is 0.
        low, high: bootstrap interval of `change`.
        limit: the limit for `change`.
        fixed: whether the limit is for the value itself.
        outcome: `met (whole interval)`, `met`, `not met`, `not tested`, or `not applicable:` and
            the reason; see `rule`.
    """

    variant: str
    text: str
    n: int
    change: float
    low: float
    high: float
    limit: float
    fixed: bool
    outcome: str


def rule(plan: Plan) -> str:
    """The criteria of a plan and how they are judged, as text."""
    known = {metric.name: metric for metric in study_metrics(plan.schemes)}
    texts = [_rule(criterion, known[criterion.metric], plan) for criterion in plan.criteria]
    premises: dict[Premise, list[str]] = {}
    for criterion in plan.criteria:
        if criterion.applies_if:
            labels = premises.setdefault(criterion.applies_if, [])
            labels.append(criterion_text(criterion, known[criterion.metric], plan))
    conditions = [_premise(each, known, plan, labels) for each, labels in premises.items()]
    return " ".join([f"Acceptance criteria: {'; '.join(texts)}.", *conditions, _OUTCOMES])


def fails_none(results: Results) -> list[str]:
    """The candidates that are measured and fail no criterion of the plan."""
    found = {name: check_criteria(results, name) for name in results.plan.candidates}
    return [
        name
        for name, criteria in found.items()
        if any(each.n for each in criteria) and all(each.outcome != NOT_MET for each in criteria)
    ]


def check_criteria(results: Results, variant: str) -> list[CriterionResult]:
    """Apply every criterion of the plan to one of its variants."""
    return [_apply(results, criterion, variant) for criterion in results.plan.criteria]


def criterion_text(criterion: Criterion, metric: StudyMetric, plan: Plan) -> str:
    """What the criterion compares with what."""
    if criterion.against == FIXED:
        return metric.label
    forms = " across residual forms" if criterion.across_residual_forms else ""
    return f"{metric.label} against {_against(criterion.against, plan)}{forms}"


def _against(against: str, plan: Plan) -> str:
    return plan.reference if against == REFERENCE else against


def _rule(criterion: Criterion, metric: StudyMetric, plan: Plan) -> str:
    bound = "at most" if metric.better == "lower" else "at least"
    if criterion.against == FIXED:
        return f"{metric.label} is {bound} {criterion.limit}"
    other = "the unquantized model" if criterion.against == UNQUANTIZED else criterion.against
    if other == REFERENCE:
        other = f"the reference ({plan.reference})"
    if isinstance(criterion.limit, str):
        limit = f"the {criterion.limit}"
    else:
        limit = f"{100 * criterion.limit:+.4g}%" if criterion.limit else "0"
    forms = ", also across residual forms" if criterion.across_residual_forms else ""
    return f"the change of {metric.label} from {other} is {bound} {limit}{forms}"


def _premise(
    premise: Premise, known: Mapping[str, StudyMetric], plan: Plan, criteria: list[str]
) -> str:
    variant = _against(premise.variant, plan)
    return (
        f"If the mean {known[premise.metric].label} of {variant} is not above {premise.above:g}, "
        f"{premise.otherwise}, and these criteria do not apply: {', '.join(criteria)}."
    )


def _apply(results: Results, criterion: Criterion, variant: str) -> CriterionResult:
    plan = results.plan
    metric = next(m for m in study_metrics(plan.schemes) if m.name == criterion.metric)
    limit = criterion.limit
    if isinstance(limit, str):
        assert limit == NOISE_FLOOR
        own = [criterion.against] if criterion.against in plan.variants else []
        limit = results.noise_floor(metric, own)[0]
    n, change, low, high = _change(results, criterion, metric, variant)
    reason = _inapplicable(results, criterion, metric, variant)
    return CriterionResult(
        variant=variant,
        text=criterion_text(criterion, metric, plan),
        n=n,
        change=change,
        low=low,
        high=high,
        limit=limit,
        fixed=criterion.against == FIXED,
        outcome=(
            f"{NOT_APPLICABLE}: {reason}"
            if reason and n
            else _outcome(n, change, (low, high), limit, metric.better)
        ),
    )


def _inapplicable(results: Results, criterion: Criterion, metric: StudyMetric, variant: str) -> str:
    """Why a criterion does not apply to a variant; empty if it does."""
    other = _against(criterion.against, results.plan)
    if other == variant:
        return "it is the baseline"
    compared = metric.within_form and other in results.plan.variants
    if compared and not criterion.across_residual_forms and not results.same_form(variant, other):
        return "the residual forms differ"
    premise = criterion.applies_if
    if premise is None:
        return ""
    premised = next(m for m in study_metrics(results.plan.schemes) if m.name == premise.metric)
    values = results.values(premised, _against(premise.variant, results.plan)).values()
    return "" if values and fmean(values) > premise.above else premise.otherwise


def _outcome(n: int, change: float, interval: Iterable[float], limit: float, better: str) -> str:
    if not n or math.isnan(limit):
        return NOT_TESTED
    sign = 1 if better == "lower" else -1
    if not sign * change <= sign * limit:
        return NOT_MET
    whole = n >= MIN_PAIRS and all(sign * end <= sign * limit for end in interval)
    return MET_WHOLE_INTERVAL if whole else MET


def _change(
    results: Results, criterion: Criterion, metric: StudyMetric, variant: str
) -> tuple[int, float, float, float]:
    """n, change, and the interval of the change, or of the value for a fixed limit."""
    values = results.values(metric, variant)
    if criterion.against == FIXED:
        return _mean(values)
    if criterion.against == UNQUANTIZED:
        known = {each.name: each for each in study_metrics(results.plan.schemes)}
        others = results.values(known[criterion.unquantized_metric], variant)
    else:
        others = results.values(metric, _against(criterion.against, results.plan))
    conditions = [condition for condition in values if condition in others]
    if not conditions:
        return 0, math.nan, math.nan, math.nan
    subject, baseline = ([table[each] for each in conditions] for table in (values, others))
    if metric.scale == "points" and not any(baseline):
        # The relative change from 0 is not defined.
        change = 0.0 if not any(subject) else math.inf
        return len(conditions), change, change, change
    seen = compare(subject, baseline, metric.scale)
    return seen.n, seen.change, seen.low, seen.high


def _mean(values: Mapping[Condition, float]) -> tuple[int, float, float, float]:
    if not values:
        return 0, math.nan, math.nan, math.nan
    x_C = np.array(list(values.values()))
    low, high = bootstrap_interval(x_C) if np.isfinite(x_C).all() else (math.nan, math.nan)
    return len(x_C), float(x_C.mean()), low, high
