from __future__ import annotations

import math

import pytest

from oasis_attn.errors import UserError
from oasis_attn.study.criteria import check_criteria
from oasis_attn.study.results import Results
from oasis_attn.study.study_report import tables_text
from oasis_attn.study.tables import criteria_summary
from oasis_attn.study.verdict import judge
from study import factories

PLAN = factories.plan(
    variants=["vanilla", "gated_attention", "softpick", "oasis"],
    compare={"oasis": ["vanilla"]},
    candidates=["oasis"],
    schemes=["w8a8-static", "w4a4"],
)
MEASURED = {
    "sink.rate@0.3": {"gated_attention": 0.0, "softpick": 0.1, "oasis": 0.0},
    "outlier.avg_kurtosis": {"gated_attention": 9.0, "softpick": 5.0, "oasis": 6.0},
    "perplexity.windowed": {"vanilla": 100.0, "oasis": 101.0},
    "perplexity.windowed@w8a8-static": {"oasis": 101.0 * 1.01},
    "perplexity.windowed@w4a4": {"oasis": 101.0 * 1.2},
}


def results(**changes) -> Results:
    """The values of the reference differ by 2 % between seeds; others do not differ."""
    records = {}
    for trial in PLAN.trials:
        seed = 1.02**trial.seed if trial.variant == "vanilla" else 1.0
        values = {
            name: variants[trial.variant] * seed
            for name, variants in (MEASURED | changes).items()
            if trial.variant in variants
        }
        records[trial] = factories.record(trial, values)
    return Results(PLAN, records)


def outcomes(found: Results) -> dict[str, str]:
    return {each.text: each.outcome for each in check_criteria(found, "oasis")}


def test_each_criterion():
    assert outcomes(results()) == {
        "sink rate at 0.3 against gated_attention": "met (whole interval)",
        "sink rate at 0.3 against softpick": "met (whole interval)",
        "avg kurtosis against gated_attention": "met (whole interval)",
        "avg kurtosis against softpick": "not met",
        "w8a8-static perplexity against unquantized": "met (whole interval)",
        "w4a4 perplexity against unquantized": "not met",
        "perplexity against vanilla": "met (whole interval)",
    }
    cost = check_criteria(results(), "oasis")[4]
    assert (cost.n, cost.limit) == (6, 0.02)
    assert cost.change == pytest.approx(0.01)


def test_a_rate_above_a_baseline_of_zero_is_not_met_and_missing_data_are_not_tested():
    some = {"gated_attention": 0.0, "oasis": 0.01}
    found = results(**{"sink.rate@0.3": some, "perplexity.windowed@w4a4": {}})
    assert outcomes(found)["sink rate at 0.3 against gated_attention"] == "not met"
    assert outcomes(found)["sink rate at 0.3 against softpick"] == "not tested"
    assert outcomes(found)["w4a4 perplexity against unquantized"] == "not tested"


def test_an_interval_that_contains_the_limit_is_met_only_by_its_mean():
    found = results(**{"perplexity.windowed": {"vanilla": 100.0, "oasis": 101.0}})
    crossing = {}
    for trial, record in found.records.items():
        values = {m.name: m.value for m in record.metrics}
        if trial.variant == "oasis":
            values["outlier.avg_kurtosis"] = (2.0, 20.0, 8.0)[trial.seed]
        crossing[trial] = factories.record(trial, values)
    assert outcomes(Results(PLAN, crossing))["avg kurtosis against gated_attention"] == "met"


def test_the_summary_has_one_row_per_measured_candidate():
    plan = factories.plan(
        variants=["vanilla", "oasis", "softpick"], compare={}, candidates=["oasis", "softpick"]
    )
    values = {"sink.rate@0.3": {"oasis": 0.1, "softpick": 0.0}}
    records = {
        trial: factories.record(trial, {"sink.rate@0.3": values["sink.rate@0.3"][trial.variant]})
        for trial in plan.trials
        if trial.variant != "vanilla"
    }
    table = criteria_summary(Results(plan, records))
    assert table.rows[0][:3] == ("oasis", "", "above a baseline of 0, not met")
    assert table.rows[1][2] == "+0.00%, met (whole interval)"
    assert criteria_summary(Results(plan, {})).rows == ()


def test_the_report_contains_the_criteria_and_candidates_must_be_in_the_plan():
    found = results()
    text = tables_text(found, judge(found))
    assert "### Acceptance criteria" in text
    assert "| oasis | avg kurtosis against softpick | not met | 6 | +20.00% |" in text
    assert math.isnan(check_criteria(Results(PLAN, {}), "oasis")[0].low)
    with pytest.raises(UserError, match="candidates: 'oasys' is not one of"):
        factories.plan(candidates=["oasys"])
