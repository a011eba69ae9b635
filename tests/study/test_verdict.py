from __future__ import annotations

import math

import pytest

from oasis_attn.study.results import BASELINE_MEAN, Results
from oasis_attn.study.statistics import Comparison
from oasis_attn.study.verdict import (
    BASELINES,
    CLAIM_INCONCLUSIVE,
    CLAIM_NOT_TESTED,
    CLAIMS,
    MIN_PAIRS,
    NOT_SUPPORTED,
    SUPPORTED,
    Prediction,
    conclude,
    decide,
    judge,
)
from study import factories

LOWER = Prediction(metric="m", variant="a", baselines=("b",), sign=-1, size=-0.10)


def seen(change: float, low: float, high: float, n: int = 9) -> Comparison:
    return Comparison(
        n=n, mean=1.0 + change, baseline_mean=1.0, change=change, low=low, high=high,
        effect_size=math.nan, p=math.nan,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("comparison", "p", "floor", "outcome"),
    [
        (None, math.nan, 0.01, "not tested"),
        (seen(-0.20, -0.3, -0.1), 0.01, 0.05, "passed"),
        (seen(-0.02, -0.03, -0.01), 0.01, 0.01, "passed"),  # smaller than claimed, but there
        (seen(-0.20, -0.3, -0.1, n=2), 0.01, 0.05, "passed"),
        (seen(-0.20, -0.3, -0.1), 0.01, 0.50, "inconclusive"),  # within the noise
        (seen(-0.20, -0.3, -0.1), 0.01, math.nan, "inconclusive"),  # no noise floor known
        (seen(-0.20, -0.3, -0.1), 0.06, 0.05, "inconclusive"),
        (seen(-0.20, -0.3, -0.1), math.nan, 0.05, "inconclusive"),
        (seen(0.20, 0.1, 0.3), 0.01, 0.50, "failed"),  # the other way
        (seen(0.01, -0.05, 0.06), 0.7, 0.05, "failed"),  # ten per cent are excluded
        (seen(0.01, -0.15, 0.06), 0.7, 0.05, "inconclusive"),
        (seen(0.01, -0.05, 0.06, n=MIN_PAIRS - 1), 0.7, 0.05, "inconclusive"),
        (seen(0.01, math.nan, math.nan), 0.7, 0.05, "inconclusive"),
    ],
)
def test_the_rule(comparison, p, floor, outcome):
    assert decide(LOWER, comparison, p, floor) == outcome


def test_a_claim_of_more_is_judged_the_other_way():
    more = Prediction(metric="m", variant="a", baselines=("b",), sign=1, size=0.10)
    assert decide(more, seen(0.2, 0.1, 0.3), 0.01, 0.05) == "passed"
    assert decide(more, seen(-0.2, -0.3, -0.1), 0.01, 0.05) == "failed"
    assert decide(more, seen(0.0, -0.05, 0.05), 0.9, 0.05) == "failed"


def test_a_claim_without_a_size_is_never_failed_for_its_size():
    sizeless = Prediction(metric="m", variant="a", baselines=("b",), sign=1)
    assert decide(sizeless, seen(0.0, -0.05, 0.05), 0.9, 0.05) == "inconclusive"


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        (["passed", "passed"], SUPPORTED),
        (["passed", "inconclusive"], CLAIM_INCONCLUSIVE),
        (["passed", "failed"], NOT_SUPPORTED),
        (["failed", "not tested"], NOT_SUPPORTED),
        (["passed", "not tested"], CLAIM_NOT_TESTED),
        (["inconclusive", "not tested"], CLAIM_NOT_TESTED),
    ],
)
def test_all_tests_of_a_claim_must_be_passed(outcomes, verdict):
    assert conclude(outcomes) == verdict


def judged(value) -> dict[str, str]:
    plan = factories.plan()
    results = factories.results(plan, value)
    return {v.claim.tests[0].metric: v.verdict for v in reversed(judge(results))}


def jitter(trial) -> float:
    return 1 + 0.001 * (trial.seed + 2 * len(trial.corpus) % 3)


def test_a_study_where_oasis_halves_the_largest_activation_supports_that_claim():
    found = judged(lambda trial: jitter(trial) * (5.0 if trial.variant == "oasis" else 10.0))
    assert found["outlier.max_inf_norm"] == SUPPORTED
    assert found["perplexity.windowed@w8a8-static"] == CLAIM_NOT_TESTED
    assert found["sink.mass"] == CLAIM_NOT_TESTED


def test_a_study_where_it_doubles_does_not():
    found = judged(lambda trial: jitter(trial) * (20.0 if trial.variant == "oasis" else 10.0))
    assert found["outlier.max_inf_norm"] == NOT_SUPPORTED


def test_a_study_where_nothing_differs_excludes_what_was_claimed():
    def value(trial):
        turn = 3 * trial.seed + len(trial.corpus) + 4 * (trial.variant == "oasis")
        return 10 * (1 + 0.001 * (turn * turn % 7))

    assert judged(value)["outlier.max_inf_norm"] == NOT_SUPPORTED


def test_seeds_that_vary_more_than_variants_are_inconclusive():
    sizes = {0: 1.0, 1: 5.0, 2: 25.0, 3: 2.0}
    turned = {0: 25.0, 1: 1.0, 2: 5.0, 3: 2.0}
    found = judged(lambda trial: (turned if trial.variant == "oasis" else sizes)[trial.seed])
    assert found["outlier.max_inf_norm"] == CLAIM_INCONCLUSIVE


def test_the_mean_of_baselines_is_taken_in_each_condition():
    plan = factories.plan(noise_seeds=[])
    worth = {name: 1.0 + index for index, name in enumerate(BASELINES)}
    results = factories.results(
        plan, lambda trial: worth.get(trial.variant, 6.0) * (1 + trial.seed)
    )
    mean = next(c for c in results.comparisons("oasis") if c.baseline == BASELINE_MEAN)
    assert mean.comparison.n == 6
    assert mean.comparison.change == pytest.approx(6 / 3 - 1)


def test_only_conditions_that_both_have_are_paired_and_noise_seeds_are_not_among_them():
    plan = factories.plan()
    whole = factories.results(plan, lambda trial: 1.0 + trial.seed)
    part = {
        trial: record
        for trial, record in whole.records.items()
        if (trial.variant, trial.seed) != ("oasis", 2)
        and (trial.variant, trial.corpus) != ("vanilla", "pydoc")
    }
    results = Results(plan, part)
    by_baseline = {c.baseline: c.comparison.n for c in results.comparisons("oasis")}
    assert by_baseline["softmax1"] == 4
    assert by_baseline["vanilla"] == by_baseline[BASELINE_MEAN] == 2
    floor = results.noise_floor(results.metrics[0])
    assert floor[1] == 6  # pairs of four seeds, on one corpus


def test_every_claim_names_variants_and_metrics_that_plans_have():
    from oasis_attn.modeling.variants import variants

    for claim in CLAIMS:
        for test in claim.tests:
            assert {test.variant, *test.baselines} <= set(variants())
            assert test.size is None or math.copysign(1, test.size) == test.sign
