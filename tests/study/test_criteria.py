from __future__ import annotations

import math

import pytest

from oasis_attn.errors import UserError
from oasis_attn.study.criteria import check_criteria, rule
from oasis_attn.study.results import Results
from oasis_attn.study.study_report import tables_text
from oasis_attn.study.tables import criteria_summary, criteria_table
from oasis_attn.study.verdict import judge
from study import factories


def plan(**changes):
    fields = {
        "variants": ["vanilla", "gated_attention", "softpick", "oasis"],
        "compare": {"oasis": ["vanilla"]},
        "candidates": ["oasis"],
        "criteria": "paper",
        "schemes": ["w8a8-static-full", "w4a4"],
    }
    return factories.plan(**(fields | changes))


PLAN = plan()
MEASURED = {
    "sink.rate@0.3": {"vanilla": 0.4, "gated_attention": 0.0, "softpick": 0.1, "oasis": 0.0},
    "outlier.avg_kurtosis": {"gated_attention": 9.0, "softpick": 5.0, "oasis": 6.0},
    "outlier.mean_pearson_kurtosis": {"gated_attention": 9.0, "softpick": 5.0, "oasis": 6.0},
    "perplexity.windowed": {"vanilla": 100.0, "oasis": 101.0},
    "perplexity.windowed@w8a8-static-full": {"oasis": 101.0 * 1.01},
    "perplexity.windowed@w4a4": {"oasis": 101.0 * 1.2},
}


def results(plan=PLAN, **changes) -> Results:
    """The values of the reference differ by 2 % between seeds; others do not differ."""
    records = {}
    for trial in plan.trials:
        seed = 1.02**trial.seed if trial.variant == "vanilla" else 1.0
        values = {
            name: variants[trial.variant] * seed
            for name, variants in (MEASURED | changes).items()
            if trial.variant in variants
        }
        records[trial] = factories.record(trial, values)
    return Results(plan, records)


def outcomes(found: Results) -> dict[str, str]:
    return {each.text: each.outcome for each in check_criteria(found, "oasis")}


def test_each_criterion():
    assert outcomes(results()) == {
        "sink rate at 0.3 against gated_attention": "met (whole interval)",
        "sink rate at 0.3 against softpick": "met (whole interval)",
        "avg kurtosis against gated_attention across residual forms": "met (whole interval)",
        "avg kurtosis against softpick across residual forms": "not met",
        "mean Pearson kurtosis against gated_attention": "met (whole interval)",
        "mean Pearson kurtosis against softpick": "not met",
        "w8a8-static-full perplexity against unquantized": "met (whole interval)",
        "w4a4 perplexity against unquantized": "not met",
        "perplexity against vanilla": "met (whole interval)",
    }
    cost = check_criteria(results(), "oasis")[6]
    assert (cost.n, cost.limit) == (6, 0.02)
    assert cost.change == pytest.approx(0.01)


def test_a_criterion_against_the_variant_itself_does_not_apply():
    found = check_criteria(results(plan(candidates=["softpick"])), "softpick")
    itself = [each.outcome for each in found if each.text.endswith("against softpick")]
    assert itself == ["not applicable: it is the baseline"] * 2


def test_fewer_than_six_pairs_are_never_met_with_the_whole_interval():
    few = outcomes(results(plan(corpora=["stdlib"])))
    assert set(few.values()) == {"met", "not met"}


def test_a_criterion_on_sinks_applies_only_if_the_reference_has_sinks():
    name = "sink.rate@0.3"
    for rate, expected in (
        (0.048, "not applicable: the reference has no sinks"),
        (0.05, "not met"),
    ):
        rates = {"vanilla": rate, "gated_attention": 0.0, "softpick": 0.1, "oasis": 0.01}
        found = outcomes(results(**{name: rates}))
        assert found["sink rate at 0.3 against gated_attention"] == expected
    text = rule(PLAN)
    assert "If the mean sink rate at 0.3 of vanilla is not above 0.05, the reference has no" in text


def test_the_rule_states_limits_exactly():
    low = {"metric": "perplexity.windowed", "against": "vanilla", "limit": 0.005}
    text = rule(plan(criteria=[low, low | {"limit": 0.025}]))
    assert "at most +0.5%;" in text
    assert "at most +2.5%." in text


def test_a_metric_that_depends_on_the_residual_form_is_compared_within_one_form():
    across = {"metric": "outlier.max_inf_norm", "against": "vanilla", "limit": 0.0}
    norms = {"outlier.max_inf_norm": {"vanilla": 10.0, "oasis": 5.0}}
    found = outcomes(results(plan(criteria=[across]), **norms))
    assert set(found.values()) == {"not applicable: the residual forms differ"}
    explicit = across | {"across_residual_forms": True}
    found = outcomes(results(plan(criteria=[explicit]), **norms))
    assert set(found.values()) == {"met (whole interval)"}


def test_a_fixed_limit_is_for_the_value_itself():
    fixed = [
        {"metric": "sink.rate@0.3", "against": "fixed", "limit": 0.02},
        {"metric": "arith.pass@1.strict", "against": "fixed", "limit": 0.5},
    ]
    found = results(plan(criteria=fixed), **{"arith.pass@1.strict": {"oasis": 0.4}})
    assert list(outcomes(found).values()) == ["met (whole interval)", "not met"]
    table = criteria_table(found)
    assert table.rows[1] == ("oasis", "arith Pass@1", "not met", "6", "0.4", "0.4 to 0.4", "0.5")
    assert "sink rate at 0.3 is at most 0.02; arith Pass@1 is at least 0.5." in rule(found.plan)


def test_a_rate_above_a_baseline_of_zero_is_not_met_and_missing_data_are_not_tested():
    some = {"vanilla": 0.4, "gated_attention": 0.0, "oasis": 0.01}
    found = results(**{"sink.rate@0.3": some, "perplexity.windowed@w4a4": {}})
    assert outcomes(found)["sink rate at 0.3 against gated_attention"] == "not met"
    assert outcomes(found)["sink rate at 0.3 against softpick"] == "not tested"
    assert outcomes(found)["w4a4 perplexity against unquantized"] == "not tested"


def test_an_interval_that_contains_the_limit_is_met_only_by_its_mean():
    found = results()
    crossing = {}
    for trial, record in found.records.items():
        values = {m.name: m.value for m in record.metrics}
        if trial.variant == "oasis":
            values["outlier.mean_pearson_kurtosis"] = (2.0, 20.0, 8.0)[trial.seed]
        crossing[trial] = factories.record(trial, values)
    text = "mean Pearson kurtosis against gated_attention"
    assert outcomes(Results(PLAN, crossing))[text] == "met"


def test_the_summary_has_one_row_per_measured_candidate():
    sinks = [{"metric": "sink.rate@0.3", "against": "softpick", "limit": 0.0}]
    two = factories.plan(
        variants=["vanilla", "oasis", "softpick"], compare={}, candidates=["oasis", "softpick"],
        criteria=sinks,
    )  # fmt: skip
    values = {"oasis": 0.1, "softpick": 0.0}
    records = {
        trial: factories.record(trial, {"sink.rate@0.3": values[trial.variant]})
        for trial in two.trials
        if trial.variant != "vanilla"
    }
    table = criteria_summary(Results(two, records))
    assert table.columns == ("variant", "sink rate at 0.3 against softpick (limit +0.00%)")
    assert table.rows == (
        ("oasis", "above a baseline of 0, not met"),
        ("softpick", "not applicable: it is the baseline"),
    )
    assert criteria_summary(Results(two, {})).rows == ()


def test_the_report_contains_the_criteria():
    found = results()
    text = tables_text(found, judge(found))
    assert "### Acceptance criteria" in text
    assert "| oasis | mean Pearson kurtosis against softpick | not met | 6 | +20.00% |" in text
    assert math.isnan(check_criteria(Results(PLAN, {}), "oasis")[0].low)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": ["oasys"]}, "candidates: 'oasys' is not one of"),
        ({"candidates": []}, "criteria: they require candidates"),
        ({"criteria": []}, "candidates require criteria"),
        ({"criteria": "papers"}, "'papers' is not one of necessity, .*; did you mean 'paper'"),
        ({"criteria": 3}, "criteria: 3 is not a list"),
        (
            {"criteria": [{"metric": "sink.mass"}]},
            "criteria: fields 'against', 'limit' are missing",
        ),
        ({"schemes": ["w4a4"]}, "criteria: metric: 'perplexity.windowed@w8a8-static-full' is not"),
    ],
)
def test_wrong_criteria_are_one_clear_error(changes, message):
    with pytest.raises(UserError, match=message):
        plan(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrik": 1}, "criteria: 'metrik' is not one of .*did you mean 'metric'"),
        ({"metric": "sink.mas"}, "did you mean 'sink.mass'"),
        ({"metric": "null.mass"}, "neither more nor less null.mass is better"),
        ({"against": "gated"}, "criteria: against: 'gated' is not .*'gated_attention'"),
        ({"against": "unquantized"}, "'sink.mass' is not a metric of a quantized model"),
        ({"limit": "floor"}, "limit .or a number.: 'floor' is not one of noise floor"),
        ({"limit": True}, "limit: True is not a number"),
        ({"against": "fixed", "limit": "noise floor"}, "'fixed' requires a number"),
        ({"across_residual_forms": "yes"}, "across_residual_forms: 'yes' is neither true nor"),
        (
            {"applies_if": {"metric": "sink.mass"}},
            "applies_if: fields 'above', 'otherwise' are missing",
        ),
        (
            {"applies_if": {"metric": "sink.mas", "above": 0.1, "otherwise": "x"}},
            "applies_if: metric: 'sink.mas'",
        ),
    ],
)
def test_a_wrong_criterion_is_one_clear_error(changes, message):
    criterion = {"metric": "sink.mass", "against": "softpick", "limit": 0.0}
    with pytest.raises(UserError, match=message):
        plan(criteria=[criterion | changes])
