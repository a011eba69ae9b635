from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from oasis_attn.errors import UserError
from oasis_attn.study.statistics import (
    bootstrap_interval,
    bound,
    compare,
    equivalence_p,
    hedges_g,
    holm,
    log_slope,
    noise_floor,
    paired_p,
)

positive = st.floats(1e-3, 1e3)
pairs = st.lists(st.tuples(positive, positive), min_size=3, max_size=8)


def test_ratio_by_hand():
    found = compare([2.0, 8.0], [1.0, 1.0], "ratio")
    assert found.n == 2
    assert found.mean == pytest.approx(4.0)
    assert found.baseline_mean == 1.0
    assert found.change == pytest.approx(3.0)
    assert found.low <= 3.0 <= found.high


def test_points_by_hand():
    found = compare([0.0, 0.5, 0.1], [0.1, 0.2, 0.1], "points")
    assert found.change == pytest.approx(0.2 / (0.4 / 3) - 1)
    assert compare([0.1, 0.2], [0.0, 0.0], "points").change != 0.1
    assert math.isnan(compare([0.1, 0.2], [0.0, 0.0], "points").change)


def test_a_rise_of_negative_values_is_a_positive_change():
    assert compare([-1.8, -1.8], [-2.0, -2.0], "points").change == pytest.approx(0.1)


def test_p_is_scipy_s_paired_t_test():
    x, y = np.array([3.0, 4.0, 6.0, 5.0]), np.array([1.0, 5.0, 2.0, 2.5])
    assert compare(x, y, "points").p == pytest.approx(stats.ttest_rel(x, y).pvalue)
    logs = stats.ttest_rel(np.log(x), np.log(y)).pvalue
    assert compare(x, y, "ratio").p == pytest.approx(logs)


def test_hedges_g_by_hand():
    # mean 3.5, s = sqrt(3.5), and Hedges' table: J(5) = 0.8408
    six = np.arange(1.0, 7.0)
    assert hedges_g(six) == pytest.approx(math.sqrt(3.5) * 0.8408, abs=1e-4)
    assert math.isnan(hedges_g(six[:5]))  # too few to determine a standard deviation
    # J is close to 1 - 3 / (4 m - 1)
    differences = np.arange(20.0)
    d = differences.mean() / differences.std(ddof=1)
    assert hedges_g(differences) == pytest.approx(d * (1 - 3 / (4 * 19 - 1)), rel=1e-3)


def test_what_does_not_vary():
    same = compare([1.0, 2.0, 3.0] * 2, [1.0, 2.0, 3.0] * 2, "ratio")
    assert (same.change, same.low, same.high, same.effect_size, same.p) == (0, 0, 0, 0, 1)
    all_alike = compare([2.0] * 6, [1.0] * 6, "points")
    assert (all_alike.effect_size, all_alike.p) == (math.inf, 0)


def test_a_single_pair_has_no_spread():
    one = compare([2.0], [1.0], "ratio")
    assert one.change == pytest.approx(1.0)
    assert all(math.isnan(x) for x in (one.low, one.high, one.effect_size, one.p))


def test_values_not_finite_give_no_change():
    found = compare([math.inf, 2.0], [1.0, 1.0], "ratio")
    assert found.n == 2
    assert found.mean == math.inf
    assert math.isnan(found.change)
    assert math.isnan(found.p)


def test_interval_is_scipy_s_bca():
    x = np.array([1.0, 2.0, 4.0, 3.0, 7.0, 5.0])
    expected = stats.bootstrap((x,), np.mean, n_resamples=9999, rng=np.random.default_rng(0))
    assert bootstrap_interval(x) == pytest.approx(tuple(expected.confidence_interval))


def test_interval_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = [
        low <= 0 <= high
        for low, high in (bootstrap_interval(rng.normal(size=15)) for _ in range(60))
    ]
    assert 0.8 < np.mean(covered) <= 1


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
    corrected = holm([0.01, math.nan, 0.04])
    assert corrected[::2] == pytest.approx([0.02, 0.04])
    assert math.isnan(corrected[1])


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_order_and_lies_between_p_and_bonferroni(p):
    corrected = holm(p)
    assert all(raw <= new <= 1 for raw, new in zip(p, corrected, strict=True))
    assert not p or min(corrected) == min(1.0, min(p) * len(p))
    ranked = [new for _, new in sorted(zip(p, corrected, strict=True))]
    assert ranked == sorted(ranked)


@settings(max_examples=20, deadline=None)
@given(pairs)
def test_a_ratio_turned_round_is_its_inverse(values):
    x, y = zip(*values, strict=True)
    there, back = compare(x, y, "ratio"), compare(y, x, "ratio")
    assert (1 + there.change) * (1 + back.change) == pytest.approx(1)
    assert there.p == pytest.approx(back.p, abs=1e-9)
    assert there.difference == pytest.approx(-back.difference, abs=1e-9)
    assert there.effect_size == pytest.approx(-back.effect_size, rel=1e-3, abs=1e-9, nan_ok=True)


@settings(max_examples=20, deadline=None)
@given(pairs)
def test_a_common_scale_changes_no_change(values):
    x, y = (np.array(side) for side in zip(*values, strict=True))
    a, b = compare(x, y, "points"), compare(8 * x, 8 * y, "points")  # no rounding in this
    assert (a.change, a.low, a.high) == pytest.approx((b.change, b.low, b.high))


def test_noise_floor_by_hand():
    floor, n = noise_floor([[1.0, 2.0], [4.0, 1.0]], "ratio")
    assert n == 2
    assert floor == pytest.approx(math.exp(math.log(2) * math.sqrt((1 + 4) / 2)) - 1)
    floor, n = noise_floor([[0.1, 0.3, 0.2]], "points")
    assert (floor, n) == (pytest.approx(math.sqrt((1 + 0.25 + 0.25) / 3)), 3)
    assert noise_floor([[0.0, 0.0]], "points") == (0.0, 1)


def test_no_repeats_no_floor():
    floor, n = noise_floor([[1.0], [2.0]], "ratio")
    assert n == 0
    assert math.isnan(floor)


@pytest.mark.parametrize(
    ("x", "y", "scale", "message"),
    [
        ([1.0], [1.0, 2.0], "ratio", "cannot be paired"),
        ([], [], "ratio", "cannot be paired"),
        ([0.0], [1.0], "ratio", "requires values above 0"),
        ([1.0], [1.0], "ratios", "did you mean 'ratio'"),
    ],
)
def test_bad_input(x, y, scale, message):
    with pytest.raises(UserError, match=message):
        compare(x, y, scale)


def test_p_of_one_is_nan():
    assert math.isnan(paired_p(np.array([1.0])))


def test_equivalence_by_an_independent_computation():
    rng = np.random.default_rng(3)
    for mean in (0.0, 0.04, -0.2):
        d = rng.normal(mean, 0.1, size=12)
        standard_error = d.std(ddof=1) / math.sqrt(12)
        t_low, t_high = (d.mean() + 0.1) / standard_error, (d.mean() - 0.1) / standard_error
        expected = max(stats.t.sf(t_low, 11), stats.t.cdf(t_high, 11))
        assert equivalence_p(d, 0.1) == pytest.approx(expected)
        # the 90 % interval lies within the bounds if and only if p is below 5 %
        reach = stats.t.ppf(0.95, 11) * standard_error
        inside = d.mean() - reach > -0.1 and d.mean() + reach < 0.1
        assert inside == (equivalence_p(d, 0.1) < 0.05)


def test_equivalence_needs_ten_pairs_and_does_not_depend_on_the_direction():
    d = np.linspace(-0.01, 0.03, 10)
    assert math.isnan(equivalence_p(d[:9], 0.1))
    assert equivalence_p(d, 0.1) == pytest.approx(equivalence_p(-d, 0.1))
    assert equivalence_p(np.full(10, 0.05), 0.1) == 0
    assert equivalence_p(np.full(10, 0.2), 0.1) == 1
    x, y = np.exp(d), np.ones(10)
    there, back = compare(x, y, "ratio", 0.1), compare(y, x, "ratio", 0.1)
    assert there.p_equivalence == pytest.approx(back.p_equivalence)
    assert there.p_equivalence == pytest.approx(equivalence_p(d, math.log(1.1)))
    assert bound(0.1, "points") == bound(0.1, "difference") == 0.1
    assert math.isnan(compare(x, y, "ratio").p_equivalence)


@pytest.mark.parametrize("n", [10, 30])
@pytest.mark.parametrize("side", [-1, 1])
def test_equivalence_is_found_wrongly_at_the_margin_in_at_most_five_per_cent(n, side):
    rng, draws = np.random.default_rng(n + side), 2000
    x = rng.normal(side * 0.1, 0.05, size=(draws, n))
    wrong = np.mean([equivalence_p(row, 0.1) < 0.05 for row in x])
    three_errors = 3 * math.sqrt(0.05 * 0.95 / draws)
    assert abs(wrong - 0.05) <= three_errors  # at this spread the test is exact


def test_equivalence_has_power_within_the_margin_and_is_conservative_for_a_large_spread():
    rng = np.random.default_rng(0)
    narrow, wide = (rng.normal(0, spread, size=(500, 10)) for spread in (0.05, 1.0))
    assert np.mean([equivalence_p(row, 0.1) < 0.05 for row in narrow]) > 0.95
    assert np.mean([equivalence_p(row, 0.1) < 0.05 for row in wide]) < 0.05


def test_difference_tests_hold_their_level_and_holm_that_of_the_table():
    rng = np.random.default_rng(5)
    tables = rng.normal(size=(600, 5, 10))
    p = [[paired_p(row) for row in table] for table in tables]
    single = np.mean(np.array(p) < 0.05)
    family = np.mean([min(holm(row)) < 0.05 for row in p])
    assert abs(single - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 3000)
    assert family < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600)


def test_log_slope_is_the_power_of_growth():
    layers = [1, 2, 4, 8]
    assert log_slope(layers, [3 * n**0.7 for n in layers]) == pytest.approx(0.7)
    noisy = [1.0, 2.5, 3.0, 9.0]
    expected = stats.linregress(np.log(layers), np.log(noisy)).slope
    assert log_slope(layers, noisy) == pytest.approx(expected)
    assert math.isnan(log_slope(layers, [1.0, 0.0, 1.0, 1.0]))
    assert math.isnan(log_slope(layers, [1.0, math.inf, 1.0, 1.0]))
