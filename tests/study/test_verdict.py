from __future__ import annotations

import math

import pytest

from oasis_attn.study.results import MEAN, Results
from oasis_attn.study.statistics import Comparison
from oasis_attn.study.verdict import (
    BASELINES,
    CLAIMS,
    LEAST,
    NOT_SUPPORTED,
    NOT_TESTED,
    SUPPORTED,
    UNDECIDED,
    Prediction,
    conclude,
    decide,
    judge,
)
from study import factories

LOWER = Prediction(measure="m", subject="a", against=("b",), sign=-1, size=-0.10)


def seen(change: float, low: float, high: float, n: int = 9) -> Comparison:
    return Comparison(
        n=n, subject=1.0 + change, baseline=1.0, change=change, low=low, high=high,
        effect_size=math.nan, p=math.nan,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "p", "floor", "outcome"),
    [
        (None, math.nan, 0.01, "untested"),
        (seen(-0.20, -0.3, -0.1), 0.01, 0.05, "won"),
        (seen(-0.02, -0.03, -0.01), 0.01, 0.01, "won"),  # smaller than claimed, but there
        (seen(-0.20, -0.3, -0.1, n=2), 0.01, 0.05, "won"),
        (seen(-0.20, -0.3, -0.1), 0.01, 0.50, "open"),  # within the noise
        (seen(-0.20, -0.3, -0.1), 0.01, math.nan, "open"),  # no noise floor known
        (seen(-0.20, -0.3, -0.1), 0.06, 0.05, "open"),
        (seen(-0.20, -0.3, -0.1), math.nan, 0.05, "open"),
        (seen(0.20, 0.1, 0.3), 0.01, 0.50, "lost"),  # the other way
        (seen(0.01, -0.05, 0.06), 0.7, 0.05, "lost"),  # ten per cent are excluded
        (seen(0.01, -0.15, 0.06), 0.7, 0.05, "open"),
        (seen(0.01, -0.05, 0.06, n=LEAST - 1), 0.7, 0.05, "open"),
        (seen(0.01, math.nan, math.nan), 0.7, 0.05, "open"),
    ],
)
def test_the_rule(numbers, p, floor, outcome):
    assert decide(LOWER, numbers, p, floor) == outcome


def test_a_claim_of_more_is_judged_the_other_way():
    more = Prediction(measure="m", subject="a", against=("b",), sign=1, size=0.10)
    assert decide(more, seen(0.2, 0.1, 0.3), 0.01, 0.05) == "won"
    assert decide(more, seen(-0.2, -0.3, -0.1), 0.01, 0.05) == "lost"
    assert decide(more, seen(0.0, -0.05, 0.05), 0.9, 0.05) == "lost"


def test_a_claim_without_a_size_is_never_lost_for_want_of_it():
    sizeless = Prediction(measure="m", subject="a", against=("b",), sign=1)
    assert decide(sizeless, seen(0.0, -0.05, 0.05), 0.9, 0.05) == "open"


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        (["won", "won"], SUPPORTED),
        (["won", "open"], UNDECIDED),
        (["won", "lost"], NOT_SUPPORTED),
        (["lost", "untested"], NOT_SUPPORTED),
        (["won", "untested"], NOT_TESTED),
        (["open", "untested"], NOT_TESTED),
    ],
)
def test_all_tests_of_a_claim_must_be_won(outcomes, verdict):
    assert conclude(outcomes) == verdict


def judged(value) -> dict[str, str]:
    plan = factories.plan()
    results = factories.results(plan, value)
    return {v.claim.tests[0].measure: v.verdict for v in reversed(judge(results))}


def jitter(cell) -> float:
    return 1 + 0.001 * (cell.seed + 2 * len(cell.corpus) % 3)


def test_a_study_where_oasis_halves_the_largest_activation_supports_that_claim():
    found = judged(lambda cell: jitter(cell) * (5.0 if cell.row == "oasis" else 10.0))
    assert found["outlier.max_inf_norm"] == SUPPORTED
    assert found["perplexity.windowed@w8a8-static"] == NOT_TESTED
    assert found["sink.mass"] == NOT_TESTED


def test_a_study_where_it_doubles_does_not():
    found = judged(lambda cell: jitter(cell) * (20.0 if cell.row == "oasis" else 10.0))
    assert found["outlier.max_inf_norm"] == NOT_SUPPORTED


def test_a_study_where_nothing_differs_excludes_what_was_claimed():
    def value(cell):
        turn = 3 * cell.seed + len(cell.corpus) + 4 * (cell.row == "oasis")
        return 10 * (1 + 0.001 * (turn * turn % 7))

    assert judged(value)["outlier.max_inf_norm"] == NOT_SUPPORTED


def test_seeds_that_vary_more_than_variants_leave_it_undecided():
    sizes = {0: 1.0, 1: 5.0, 2: 25.0, 3: 2.0}
    turned = {0: 25.0, 1: 1.0, 2: 5.0, 3: 2.0}
    found = judged(lambda cell: (turned if cell.row == "oasis" else sizes)[cell.seed])
    assert found["outlier.max_inf_norm"] == UNDECIDED


def test_the_mean_of_baselines_is_taken_unit_by_unit():
    plan = factories.plan(noise_seeds=[])
    worth = {row: 1.0 + index for index, row in enumerate(BASELINES)}
    results = factories.results(plan, lambda cell: worth.get(cell.row, 6.0) * (1 + cell.seed))
    mean = next(c for c in results.comparisons("oasis") if c.against == MEAN)
    assert mean.numbers.n == 6
    assert mean.numbers.change == pytest.approx(6 / 3 - 1)


def test_only_units_that_both_have_are_paired_and_noise_seeds_are_not_among_them():
    plan = factories.plan()
    whole = factories.results(plan, lambda cell: 1.0 + cell.seed)
    part = {
        cell: record
        for cell, record in whole.records.items()
        if (cell.row, cell.seed) != ("oasis", 2) and (cell.row, cell.corpus) != ("vanilla", "pydoc")
    }
    results = Results(plan, part)
    by_row = {c.against: c.numbers.n for c in results.comparisons("oasis")}
    assert by_row["softmax1"] == 4
    assert by_row["vanilla"] == by_row[MEAN] == 2
    floor = results.floor(results.measures[0])
    assert floor[1] == 6  # pairs of four seeds, on one corpus


def test_every_claim_names_rows_and_measures_that_plans_have():
    from oasis_attn.modeling.variants import variants

    for claim in CLAIMS:
        for test in claim.tests:
            assert {test.subject, *test.against} <= set(variants())
            assert test.size is None or math.copysign(1, test.size) == test.sign
