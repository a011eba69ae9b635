from __future__ import annotations

import math

import pytest

from oasis_attn.errors import UserError
from oasis_attn.study.bar import bar
from oasis_attn.study.page import tables_text
from oasis_attn.study.results import Results
from oasis_attn.study.tables import bar_summary
from oasis_attn.study.verdict import judge
from study import factories

PLAN = factories.plan(
    variants=["vanilla", "gated_attention", "softpick", "oasis"],
    compare={"oasis": ["vanilla"]},
    bar=["oasis"],
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
    """Seeds differ by 2 % in all that is measured of the reference, and not otherwise."""
    records = {}
    for cell in PLAN.cells:
        seed = 1.02**cell.seed if cell.row == "vanilla" else 1.0
        values = {
            name: rows[cell.row] * seed
            for name, rows in (MEASURED | changes).items()
            if cell.row in rows
        }
        records[cell] = factories.record(cell, values)
    return Results(PLAN, records)


def outcomes(found: Results) -> dict[str, str]:
    return {each.text: each.outcome for each in bar(found, "oasis")}


def test_each_hurdle():
    assert outcomes(results()) == {
        "sink rate at 0.3 against gated_attention": "met for certain",
        "sink rate at 0.3 against softpick": "met for certain",
        "avg kurtosis against gated_attention": "met for certain",
        "avg kurtosis against softpick": "missed",
        "w8a8-static perplexity against its own": "met for certain",
        "w4a4 perplexity against its own": "missed",
        "perplexity against vanilla": "met for certain",
    }
    cost = bar(results(), "oasis")[4]
    assert (cost.n, cost.limit) == (6, 0.02)
    assert cost.change == pytest.approx(0.01)


def test_a_rate_above_one_that_is_zero_misses_and_what_is_not_there_is_untested():
    some = {"gated_attention": 0.0, "oasis": 0.01}
    found = results(**{"sink.rate@0.3": some, "perplexity.windowed@w4a4": {}})
    assert outcomes(found)["sink rate at 0.3 against gated_attention"] == "missed"
    assert outcomes(found)["sink rate at 0.3 against softpick"] == "untested"
    assert outcomes(found)["w4a4 perplexity against its own"] == "untested"


def test_an_interval_that_crosses_the_limit_is_met_only():
    found = results(**{"perplexity.windowed": {"vanilla": 100.0, "oasis": 101.0}})
    crossing = {}
    for cell, record in found.records.items():
        values = {m.name: m.value for m in record.metrics}
        if cell.row == "oasis":
            values["outlier.avg_kurtosis"] = (2.0, 20.0, 8.0)[cell.seed]
        crossing[cell] = factories.record(cell, values)
    assert outcomes(Results(PLAN, crossing))["avg kurtosis against gated_attention"] == "met"


def test_the_summary_has_a_row_for_each_variant_that_was_measured():
    plan = factories.plan(
        variants=["vanilla", "oasis", "softpick"], compare={}, bar=["oasis", "softpick"]
    )
    values = {"sink.rate@0.3": {"oasis": 0.1, "softpick": 0.0}}
    records = {
        cell: factories.record(cell, {"sink.rate@0.3": values["sink.rate@0.3"][cell.row]})
        for cell in plan.cells
        if cell.row != "vanilla"
    }
    table = bar_summary(Results(plan, records))
    assert table.rows[0][:3] == ("oasis", "", "above its 0, missed")
    assert table.rows[1][2] == "+0.00%, met for certain"
    assert bar_summary(Results(plan, {})).rows == ()


def test_the_report_holds_it_and_a_row_must_be_of_the_plan():
    found = results()
    text = tables_text(found, judge(found))
    assert "### The bar" in text
    assert "| oasis | avg kurtosis against softpick | missed | 6 | +20.00% |" in text
    assert math.isnan(bar(Results(PLAN, {}), "oasis")[0].low)
    with pytest.raises(UserError, match="bar: 'oasys' is not one of"):
        factories.plan(bar=["oasys"])
