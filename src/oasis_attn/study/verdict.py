"""Verdicts on the claims of a plan, computed from records by stated rules."""

from __future__ import annotations

import math
from dataclasses import dataclass

from oasis_attn.study.claim import Claim, ClaimTest
from oasis_attn.study.plan import Plan
from oasis_attn.study.results import Results
from oasis_attn.study.statistics import (
    LEVEL,
    MIN_PAIRS,
    MIN_PAIRS_EQUIVALENCE,
    Comparison,
    bound,
    exceeds,
    holm,
)
from oasis_attn.study.study_metrics import StudyMetric, study_metrics

SUPPORTED, NOT_SUPPORTED, EQUIVALENT_CLAIM, CLAIM_INCONCLUSIVE, CLAIM_NOT_TESTED = (
    "supported",
    "not supported",
    "equivalent within the margin",
    "inconclusive",
    "not tested",
)
PASSED, FAILED, EQUIVALENT, INCONCLUSIVE, NOT_TESTED = (
    "passed",
    "failed",
    "equivalent",
    "inconclusive",
    "not tested",
)
OUTCOMES = (PASSED, FAILED, EQUIVALENT, INCONCLUSIVE, NOT_TESTED)
SIGNIFICANCE = 0.05
_DIFFERENCE = (
    "A test is passed if the change has the claimed direction, its p-value (paired t-test with "
    f"Holm's correction for all p-values of this table) is below {SIGNIFICANCE}, and the change is "
    "larger than the noise floor; for metrics that vary in proportion, both are factors. A test is "
    "failed if the change is significant in the opposite "
    f"direction. It is also failed if the change is not significant and its {LEVEL:.0%} interval, "
    f"from at least {MIN_PAIRS} pairs, contains only changes smaller than the claimed one. "
    "Otherwise the test is inconclusive."
)
_EQUIVALENCE = (
    "A test with a margin is also a test for equivalence (two one-sided paired t-tests, with at "
    f"least {MIN_PAIRS_EQUIVALENCE} pairs; their p-values are among those that Holm's correction "
    "counts). If it is significant, the two are equivalent within the margin, whether or not they "
    "differ by less. For metrics that vary in proportion, a margin m stands for ratios from "
    "1 / (1 + m) to 1 + m; for others it is an absolute difference. A test that expects equality "
    "is passed if the two are equivalent, and failed if they differ significantly by more than the "
    "margin."
)
_SLOPE = (
    "A slope is that of the least-squares line of log metric against log layers, one slope for "
    "each corpus and seed. Slopes are compared in pairs with the same corpus and seed; their "
    "change is the difference, and they have no noise floor."
)
_CONCLUSION = (
    "A claim is supported if all of its tests are passed, and equivalent within the margin if all "
    "are equivalent. It is not supported if one is failed, or if some but not all are equivalent. "
    "Otherwise it is inconclusive, or not tested if the study lacks the data for a test."
)


@dataclass(frozen=True, kw_only=True)
class ClaimTestResult:
    """The result of one test.

    Attributes:
        test: the prediction.
        comparison: the statistics; None if the study has no pair for it.
        p_holm, p_equivalence_holm: p-values of the difference and of equivalence, with Holm's
            correction for all p-values of the verdict.
        noise_floor: relative change that a different seed alone causes; NaN for a slope.
        outcome: one of `OUTCOMES`.
    """

    test: ClaimTest
    comparison: Comparison | None
    p_holm: float
    p_equivalence_holm: float
    noise_floor: float
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim, the results of its tests, and the verdict that follows from them."""

    claim: Claim
    results: tuple[ClaimTestResult, ...]
    verdict: str


def rule(plan: Plan) -> str:
    """How the claims of a plan are judged, as text; empty if it states none."""
    tests = [test for claim in plan.claims for test in claim.tests]
    if not tests:
        return ""
    equivalence = any(test.margin is not None for test in tests)
    slope = any(test.kind == "slope" for test in tests)
    parts = [_DIFFERENCE, *[_EQUIVALENCE] * equivalence, *[_SLOPE] * slope, _CONCLUSION]
    return " ".join(parts)


def judge(results: Results) -> list[Verdict]:
    """Judge each claim of the plan by `rule`; all p-values are corrected together."""
    known = {metric.name: metric for metric in study_metrics(results.plan.schemes)}
    tests = [test for claim in results.plan.claims for test in claim.tests]
    comparisons = [_compare(results, known[test.metric], test) for test in tests]
    p = [math.nan if each is None else each.p for each in comparisons]
    p += [math.nan if each is None else each.p_equivalence for each in comparisons]
    corrected = holm(p)
    rows = zip(tests, comparisons, corrected[: len(tests)], corrected[len(tests) :], strict=True)
    tested = iter(
        [
            _result(results, known[test.metric], test, comparison, p_holm, p_equivalence)
            for test, comparison, p_holm, p_equivalence in rows
        ]
    )
    verdicts = []
    for claim in results.plan.claims:
        own = tuple(next(tested) for _ in claim.tests)
        verdict = conclude([result.outcome for result in own])
        verdicts.append(Verdict(claim=claim, results=own, verdict=verdict))
    return verdicts


def _compare(results: Results, metric: StudyMetric, test: ClaimTest) -> Comparison | None:
    compare = results.compare_slopes if test.kind == "slope" else results.compare
    return compare(metric, test.variant, test.baselines, test.margin)


def _result(
    results: Results,
    metric: StudyMetric,
    test: ClaimTest,
    comparison: Comparison | None,
    p_holm: float,
    p_equivalence_holm: float,
) -> ClaimTestResult:
    slope = test.kind == "slope"
    floor = math.nan if slope else results.noise_floor(metric, test.baselines)[0]
    scale = "difference" if slope else metric.scale
    return ClaimTestResult(
        test=test,
        comparison=comparison,
        p_holm=p_holm,
        p_equivalence_holm=p_equivalence_holm,
        noise_floor=floor,
        outcome=decide(test, comparison, p_holm, p_equivalence_holm, floor, scale),
    )


def decide(
    test: ClaimTest,
    comparison: Comparison | None,
    p_holm: float,
    p_equivalence_holm: float,
    noise_floor: float,
    scale: str,
) -> str:
    """The outcome of one test, by `rule`; `scale` is that of the comparison."""
    if comparison is None:
        return NOT_TESTED
    equivalent = p_equivalence_holm < SIGNIFICANCE
    significant = p_holm < SIGNIFICANCE
    if test.expect == "equal":
        assert test.margin is not None
        if equivalent:
            return PASSED
        beyond = abs(comparison.difference) > bound(test.margin, scale)
        return FAILED if significant and beyond else INCONCLUSIVE
    if equivalent:
        return EQUIVALENT
    claimed = test.sign * comparison.difference > 0
    if significant and not claimed:
        return FAILED
    if significant and (test.kind == "slope" or exceeds(comparison, noise_floor, scale)):
        return PASSED
    if not significant and test.size is not None and comparison.n >= MIN_PAIRS:
        ends = (comparison.low, comparison.high)
        if all(test.sign * end < abs(test.size) for end in ends):
            return FAILED
    return INCONCLUSIVE


def conclude(outcomes: list[str]) -> str:
    """The verdict on a claim from the outcomes of its tests, by `rule`."""
    if FAILED in outcomes:
        return NOT_SUPPORTED
    if NOT_TESTED in outcomes:
        return CLAIM_NOT_TESTED
    if EQUIVALENT in outcomes:
        return EQUIVALENT_CLAIM if set(outcomes) == {EQUIVALENT} else NOT_SUPPORTED
    return SUPPORTED if set(outcomes) == {PASSED} else CLAIM_INCONCLUSIVE
