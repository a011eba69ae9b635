from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from oasis_attn.errors import UserError
from oasis_attn.study.claim import ClaimTest, read_claims
from oasis_attn.study.results import BASELINE_MEAN, Results
from oasis_attn.study.statistics import MIN_PAIRS, Comparison, holm
from oasis_attn.study.tables import claim_tests_table, results_tables
from oasis_attn.study.verdict import (
    CLAIM_INCONCLUSIVE,
    CLAIM_NOT_TESTED,
    EQUIVALENT_CLAIM,
    NOT_SUPPORTED,
    SUPPORTED,
    conclude,
    decide,
    judge,
    rule,
)
from study import factories

LOWER = ClaimTest(metric="m", variant="a", baselines=("b",), expect="lower", size=-0.10)
EQUAL = ClaimTest(metric="m", variant="a", baselines=("b",), expect="equal", margin=0.05)


def seen(change: float, low: float, high: float, n: int = 9) -> Comparison:
    return Comparison(
        n=n, mean=1.0 + change, baseline_mean=1.0, difference=math.log1p(change), change=change,
        low=low, high=high, effect_size=math.nan, p=math.nan,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("comparison", "p", "floor", "outcome"),
    [
        (None, math.nan, 0.01, "not tested"),
        (seen(-0.20, -0.3, -0.1), 0.01, 0.05, "passed"),
        (seen(-0.02, -0.03, -0.01), 0.01, 0.01, "passed"),  # smaller than claimed, but there
        (seen(-0.20, -0.3, -0.1, n=2), 0.01, 0.05, "passed"),
        (seen(-0.20, -0.3, -0.1), 0.01, 0.50, "inconclusive"),  # within the noise
        (seen(-0.49, -0.6, -0.3), 0.01, 1.00, "inconclusive"),  # less than a factor of 2
        (seen(-0.51, -0.6, -0.3), 0.01, 1.00, "passed"),
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
    assert decide(LOWER, comparison, p, math.nan, floor, "ratio") == outcome


def test_a_claim_of_more_is_judged_the_other_way():
    more = ClaimTest(metric="m", variant="a", baselines=("b",), expect="higher", size=0.10)
    for comparison, p, outcome in (
        (seen(0.2, 0.1, 0.3), 0.01, "passed"),
        (seen(-0.2, -0.3, -0.1), 0.01, "failed"),
        (seen(0.0, -0.05, 0.05), 0.9, "failed"),
    ):
        assert decide(more, comparison, p, math.nan, 0.05, "ratio") == outcome


def test_a_claim_without_a_size_is_never_failed_for_its_size():
    sizeless = ClaimTest(metric="m", variant="a", baselines=("b",), expect="higher")
    outcome = decide(sizeless, seen(0.0, -0.05, 0.05), 0.9, math.nan, 0.05, "ratio")
    assert outcome == "inconclusive"


@pytest.mark.parametrize(
    ("comparison", "p", "p_equivalence", "outcome", "of_equality"),
    [
        (seen(-0.01, -0.02, 0.0), 0.30, 0.01, "equivalent", "passed"),
        (seen(-0.01, -0.02, 0.0), 0.01, 0.01, "equivalent", "passed"),  # differs, but by little
        (seen(-0.20, -0.3, -0.1), 0.01, 0.99, "passed", "failed"),
        (seen(-0.04, -0.06, -0.02), 0.01, 0.30, "passed", "inconclusive"),
        (seen(-0.01, -0.20, 0.2), 0.90, 0.30, "inconclusive", "inconclusive"),
        (seen(-0.01, -0.02, 0.0), 0.30, math.nan, "failed", "inconclusive"),  # too few pairs
    ],
)
def test_the_rule_with_a_margin(comparison, p, p_equivalence, outcome, of_equality):
    assert decide(LOWER, comparison, p, p_equivalence, 0.01, "ratio") == outcome
    assert decide(EQUAL, comparison, p, p_equivalence, 0.01, "ratio") == of_equality


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        (["passed", "passed"], SUPPORTED),
        (["passed", "inconclusive"], CLAIM_INCONCLUSIVE),
        (["passed", "failed"], NOT_SUPPORTED),
        (["failed", "not tested"], NOT_SUPPORTED),
        (["passed", "not tested"], CLAIM_NOT_TESTED),
        (["inconclusive", "not tested"], CLAIM_NOT_TESTED),
        (["equivalent", "equivalent"], EQUIVALENT_CLAIM),
        (["equivalent", "passed"], NOT_SUPPORTED),
        (["equivalent", "inconclusive"], NOT_SUPPORTED),
        (["equivalent", "not tested"], CLAIM_NOT_TESTED),
    ],
)
def test_all_tests_of_a_claim_must_be_passed(outcomes, verdict):
    assert conclude(outcomes) == verdict


def judged(value) -> dict[str, str]:
    plan = factories.plan()
    results = factories.results(plan, value)
    return {v.claim.tests[0].metric: v.verdict for v in judge(results)}


def jitter(trial) -> float:
    return 1 + 0.001 * (trial.seed + 2 * len(trial.corpus) % 3)


def test_a_study_where_oasis_halves_the_largest_activation_supports_that_claim():
    found = judged(lambda trial: jitter(trial) * (5.0 if trial.variant == "oasis" else 10.0))
    assert found["outlier.max_inf_norm"] == SUPPORTED
    assert found["perplexity.windowed@w8a8-static-full"] == CLAIM_NOT_TESTED
    assert "sink.mass" not in found  # a study shows only the claims that its plan states


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


PERPLEXITY = ("perplexity.windowed",)
BASELINES = ("vanilla", "clipped_softmax", "gated_attention", "softmax1", "attn_residual")


def test_the_mean_of_baselines_is_taken_in_each_condition():
    plan = factories.plan(noise_seeds=[])
    worth = {name: 1.0 + index for index, name in enumerate(BASELINES)}
    results = factories.results(
        plan, lambda trial: worth.get(trial.variant, 6.0) * (1 + trial.seed), PERPLEXITY
    )
    mean = next(c for c in results.comparisons("oasis") if c.baseline == BASELINE_MEAN)
    assert mean.comparison.n == 6
    assert mean.comparison.change == pytest.approx(6 / 3 - 1)


def test_a_metric_that_depends_on_the_residual_form_has_baselines_of_one_form():
    results = factories.results(factories.plan(), lambda trial: 1.0 + trial.seed)
    assert [each.baseline for each in results.comparisons("oasis")] == ["attn_residual"]
    others = ["attn_residual", "oasis", "oasis_quiet"]  # mixes of another scale, and of the same
    plan = factories.plan(
        variants=["vanilla", "oasis_unit", *others], compare={"oasis_unit": others}
    )
    assert plan.residual_form("oasis_unit") == "depth with mix_scale rms"
    results = factories.results(plan, lambda trial: 1.0 + trial.seed)
    assert [each.baseline for each in results.comparisons("oasis_unit")] == ["oasis_quiet"]


def test_only_conditions_that_both_have_are_paired_and_noise_seeds_are_not_among_them():
    plan = factories.plan()
    whole = factories.results(plan, lambda trial: 1.0 + trial.seed, PERPLEXITY)
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


def test_the_noise_floor_is_that_of_the_baseline_if_the_reference_lacks_the_metric():
    plan = factories.plan(
        variants=["vanilla", "softmax1", "oasis"], compare={"oasis": ["softmax1"]}, noise_seeds=[]
    )
    whole = factories.results(plan, lambda trial: 0.5 + 0.01 * trial.seed, ("sink.mass",))
    without = {
        trial: replace(record, metrics=()) if trial.variant == "vanilla" else record
        for trial, record in whole.records.items()
    }
    results = Results(plan, without)
    (metric,) = (each for each in results.metrics if each.name == "sink.mass")
    assert math.isnan(results.noise_floor(metric)[0])
    floor, pairs = results.noise_floor(metric, ["softmax1"])
    assert (0 < floor < 0.05, pairs) == (True, 6)
    assert results.comparisons("oasis")[0].noise_floor == floor
    still = {
        trial: factories.record(trial, {"sink.mass": 0.5}) if trial.variant == "oasis" else record
        for trial, record in without.items()
    }
    results = Results(plan, still)
    assert results.noise_floor(metric, ["oasis"])[0] == 0
    for both in (["oasis", "softmax1"], ["softmax1", "oasis"]):
        assert results.noise_floor(metric, both) == (floor, pairs)


def test_the_claims_of_the_paper_name_variants_and_metrics_that_plans_have():
    from oasis_attn.modeling.variants import variants

    claims = read_claims("paper")
    assert len(claims) == 10
    for claim in claims:
        for test in claim.tests:
            assert set(test.variants) <= set(variants())
    (one,) = read_claims(["paper/joint_sinks"])
    assert one in claims


CLAIM = {
    "name": "mine",
    "text": "The signal changes nothing.",
    "tests": [
        {
            "metric": "perplexity.windowed",
            "variant": "oasis",
            "baselines": ["vanilla"],
            "expect": "equal",
            "margin": 0.05,
        }
    ],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"txt": "x"}, "claims: 'txt' is not one of name, text, tests"),
        ({"name": ""}, "name of a claim: '' is not text"),
        ({"text": None}, "text of claim 'mine': None is not text"),
        ({"tests": []}, "claim 'mine': tests: a claim requires at least one"),
        ({"tests": ["x"]}, "test of claim 'mine': 'x' is not a mapping"),
    ],
)
def test_a_wrong_claim_is_one_clear_error(changes, message):
    with pytest.raises(UserError, match=message):
        factories.plan(claims=[CLAIM | changes])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sing": 1}, "test of claim 'mine': 'sing' is not one of"),
        ({"metric": "perplexity.windowe"}, "claim 'mine': metric: .*'perplexity.windowed'"),
        ({"variant": "oasys"}, "claim 'mine': variant: 'oasys' is not one of .*'oasis'"),
        ({"baselines": ["vanila"]}, "did you mean 'vanilla'"),
        ({"baselines": "vanilla"}, "baselines: 'vanilla' is not a list"),
        ({"baselines": []}, "baselines: a test of kind 'change' requires at least one"),
        ({"baselines": ["oasis"]}, "must be different other variants"),
        ({"expect": "low"}, "expect: 'low' is not one of lower, .*did you mean 'lower'"),
        ({"kind": "slop"}, "did you mean 'slope'"),
        ({"kind": "slope"}, "a slope requires sizes with different numbers of layers, not nano"),
        ({"margin": None}, "margin: a number above 0 is required"),
        ({"margin": 0}, "margin: a number above 0 is required"),
        ({"margin": "5%"}, "margin: '5%' is not a number"),
        ({"expect": "lower", "size": 0.1}, "size: 0.1 is not a change that is lower"),
        ({"metric": "outlier.max_inf_norm"}, "depends on the residual form, so that 'oasis' .dept"),
        ({"across_residual_forms": True}, "across_residual_forms has no effect on 'perplexity"),
    ],
)
def test_a_wrong_test_of_a_claim_is_one_clear_error(changes, message):
    test = CLAIM["tests"][0] | changes
    with pytest.raises(UserError, match=message):
        factories.plan(claims=[CLAIM | {"tests": [test]}])


def test_claims_of_the_package_are_chosen_by_name():
    with pytest.raises(UserError, match=r"claims: 'papers' is not one of .*; did you mean 'paper'"):
        factories.plan(claims="papers")
    with pytest.raises(UserError, match="did you mean 'paper/kurtosis'"):
        factories.plan(claims="paper/kurtosys")
    with pytest.raises(UserError, match="claims: 'kurtosis' is stated twice"):
        factories.plan(claims=["paper/kurtosis", "paper/kurtosis"])
    mine = factories.plan(claims=["paper/kurtosis", CLAIM])
    assert [claim.name for claim in mine.claims] == ["kurtosis", "mine"]


def test_a_study_without_claims_has_no_verdicts():
    results = factories.results(factories.plan(claims=[]), jitter)
    assert judge(results) == []
    assert rule(results.plan) == ""
    assert "Claims" not in [table.title for table in results_tables(results, [])]


def test_equivalence_and_difference_are_corrected_together():
    plan = factories.plan(claims=[CLAIM, "paper/largest_activation"], seeds=list(range(10, 20)))

    def value(trial):
        return jitter(trial) * (1.001 if trial.variant == "oasis" else 1.0)

    results = factories.results(plan, value, ("perplexity.windowed", "outlier.max_inf_norm"))
    verdicts = judge(results)
    assert verdicts[0].verdict == SUPPORTED
    tests = [each for verdict in verdicts for each in verdict.results]
    raw = [each.comparison.p for each in tests] + [each.comparison.p_equivalence for each in tests]
    assert math.isnan(raw[-1])  # without a margin
    shown = [each.p_holm for each in tests] + [each.p_equivalence_holm for each in tests]
    assert shown == pytest.approx(holm(raw), nan_ok=True)
    table = claim_tests_table(verdicts)
    assert table.columns[-1] == "p (Holm) of equivalence"
    assert [row[-1] for row in table.rows] == ["< 0.0001", "-"]
    assert "two one-sided paired t-tests" in rule(plan)
    assert "two one-sided" not in rule(factories.plan())


def slope_plan(**test):
    given = {"metric": "outlier.max_inf_norm", "variant": "oasis", "kind": "slope"} | test
    claim = {"name": "growth", "text": "Outliers grow with depth.", "tests": [given]}
    return factories.plan(claims=[claim], sizes=["lab-1", "lab-2", "lab-4", "lab-8"])


def test_slopes_are_fitted_for_each_corpus_and_seed_and_compared_in_pairs():
    rng = np.random.default_rng(0)
    noise = {}

    def value(trial):
        layers = int(trial.size.removeprefix("lab-"))
        power = {"oasis": 0.3, "attn_residual": 0.8}.get(trial.variant, 0.0)
        return layers**power * noise.setdefault(trial, math.exp(0.05 * rng.normal()))

    plan = slope_plan(baselines=["attn_residual"], expect="lower")
    results = factories.results(plan, value)
    (verdict,) = judge(results)
    found = verdict.results[0].comparison
    slopes = {}
    for variant in ("oasis", "attn_residual"):
        for corpus in plan.corpora:
            for seed in plan.seeds:
                points = [
                    (math.log(int(t.size[4:])), math.log(value(t)))
                    for t in plan.trials
                    if (t.variant, t.corpus, t.seed) == (variant, corpus, seed)
                ]
                slopes.setdefault(variant, []).append(stats.linregress(*np.array(points).T).slope)
    expected = stats.ttest_rel(slopes["oasis"], slopes["attn_residual"])
    assert found.n == 6
    assert found.p == pytest.approx(expected.pvalue)
    assert found.change == pytest.approx(
        np.mean(slopes["oasis"]) - np.mean(slopes["attn_residual"])
    )
    assert found.low < found.change < found.high
    assert verdict.verdict == SUPPORTED
    assert (
        "the slope of log outlier.max_inf_norm of oasis" in claim_tests_table([verdict]).rows[0][1]
    )
    assert "one slope for each corpus and seed" in rule(plan)
    (alone,) = judge(factories.results(slope_plan(expect="higher"), value))
    assert alone.verdict == SUPPORTED
    assert alone.results[0].comparison.baseline_mean == 0


def test_a_slope_needs_every_size_of_a_seed():
    plan = slope_plan(expect="higher")
    whole = factories.results(plan, lambda trial: 1.0 + trial.seed)
    part = {t: r for t, r in whole.records.items() if (t.size, t.seed) != ("lab-4", 1)}
    (verdict,) = judge(Results(plan, part))
    assert verdict.results[0].comparison.n == 4
    with pytest.raises(UserError, match=r"a slope requires a positive metric, not 'sink\.mass'"):
        slope_plan(metric="sink.mass", expect="higher")
