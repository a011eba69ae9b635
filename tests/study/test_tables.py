from __future__ import annotations

import math

from oasis_attn.study.results import BASELINE_MEAN
from oasis_attn.study.statistics import compare, noise_floor
from oasis_attn.study.storage import Status
from oasis_attn.study.tables import (
    claim_tests_table,
    comparison_table,
    means_table,
    percent,
    results_tables,
    status_table,
    verdict_table,
)
from oasis_attn.study.verdict import judge
from study import factories

NAMES = ("outlier.max_inf_norm", "perplexity.windowed@w8a8-static-full")


def value(trial) -> float:
    return (5.0 if trial.variant == "oasis" else 10.0) + trial.seed / 10 + len(trial.corpus)


RESULTS = factories.results(factories.plan(), value, NAMES)


def test_every_table_is_a_rectangle_and_says_n():
    tables = results_tables(RESULTS, judge(RESULTS))
    assert [table.title for table in tables] == [
        "Claims",
        "Tests of the claims",
        "oasis compared with its baselines",
        "stdlib, nano: mean ± standard deviation over n seeds",
        "pydoc, nano: mean ± standard deviation over n seeds",
    ]
    for table in tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert all("n" in table.columns for table in tables[1:])


def test_means_are_of_the_seeds_and_not_of_noise_seeds():
    table = means_table(RESULTS, "pydoc", "nano")
    rows = {row[0]: row for row in table.rows}
    assert rows["vanilla"][1:3] == ("3", "15.1 ± 0.1")
    assert rows["oasis"][table.columns.index("w8a8-static-full perplexity")] == "10.1 ± 0.1"


def test_comparisons_are_with_each_baseline_and_with_their_mean():
    table = comparison_table(RESULTS, "oasis")
    labels = [m.label for m in RESULTS.metrics]
    assert labels == ["max inf-norm", "w8a8-static-full perplexity"]
    all_forms = [*RESULTS.plan.compare["oasis"], BASELINE_MEAN]
    against = {labels[0]: ["attn_residual"], labels[1]: all_forms}  # the first depends on the form
    assert [row[:2] for row in table.rows] == [(m, a) for m in labels for a in against[m]]
    conditions = [(seed, corpus) for seed in (0, 1, 2) for corpus in ("stdlib", "pydoc")]
    oasis = [5 + seed / 10 + len(corpus) for seed, corpus in conditions]
    other = [10 + seed / 10 + len(corpus) for seed, corpus in conditions]
    seen = compare(oasis, other, "ratio")
    groups = [[10 + seed / 10 + len(c) for seed in (0, 1, 2, 3)] for c in ("stdlib", "pydoc")]
    floor, n = noise_floor(groups, "ratio")
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["n"] == "6"
    assert row["change"] == percent(seen.change)
    assert row["95% interval"] == f"{percent(seen.low)} to {percent(seen.high)}"
    assert row["noise floor"] == f"{floor:.2%} (n {n})"


def test_the_verdict_has_a_row_per_claim_and_its_tests_in_words():
    verdicts = judge(RESULTS)
    table = verdict_table(verdicts)
    assert [row[1] for row in table.rows] == [claim.text for claim in RESULTS.plan.claims]
    assert table.rows[0][2:] == ("supported", "1 passed")
    tests = claim_tests_table(verdicts)
    assert len(tests.rows) == sum(len(claim.tests) for claim in RESULTS.plan.claims)
    assert "(claimed: -9.26%)" in tests.rows[0][1]
    assert all(name in tests.rows[1][1] for name in RESULTS.plan.compare["oasis"])


def test_status_shows_the_reasons_of_failures():
    status = Status(
        done=("a",), failed={"b": "no luck"}, running=("c",), total=4, seconds_per_trial=1200.0
    )
    rows = dict(status_table(status, "name").rows)
    assert rows["b"] == "no luck"
    assert rows["hours left, one worker"] == "1"


def test_percentages():
    assert percent(-0.0926) == "-9.26%"
    assert percent(math.nan) == "-"
    assert percent(2e5) == "+2e+05 x"
