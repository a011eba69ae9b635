"""What docs/lab.md and docs/language_models.md say of languages is what the records show."""

from __future__ import annotations

from math import log
from operator import gt, lt, truediv
from statistics import fmean, geometric_mean

import pytest
import torch

import lab_page
from oasis_attn.data.trigger_words import TriggerWordsTask
from oasis_attn.records import Record
from oasis_attn.study.criteria import NOT_MET, check_criteria, fails_none
from study.published import of_seeds


def test_what_the_page_says_of_the_language() -> None:
    results, values = of_seeds("necessity-words", 6)

    def ratios(scheme: str, variant: str) -> list[float]:
        return values(f"task.error_ratio@{scheme}", variant)

    full, linear = "w8a8-static-full", "w8a8-static-linear"
    sink, over_median = "sink.idle_largest", "outlier.max_over_median"
    assert min(values(sink, "vanilla")) > 0.97
    *ordinary, massive = sorted(values("outlier.max_inf_norm_layer", "vanilla"))
    assert 15 < ordinary[0] < ordinary[-1] < 40 < 115 < massive < 125
    *ordinary, _ = sorted(values(over_median, "vanilla"))
    assert 240 < ordinary[0] < ordinary[-1] < 510
    assert sum(map(bool, values("outlier.massive", "vanilla"))) == 1
    assert min(values(f"task.error@{full}", "vanilla")) > log(2)
    assert min(ratios(linear, "vanilla")) > 8
    assert min(ratios("w4a4", "vanilla")) > 6
    assert max(ratios("w8a8-dynamic", "vanilla")) < 1.1
    assert max(values(sink, "softmax1_log")) < 0.02
    assert max(values(sink, "softmax1")) < 0.15
    assert max(values(f"task.error@{full}", "softmax1_log")) == pytest.approx(0.33, abs=0.005)
    assert max(values(f"task.error@{full}", "softmax1")) == pytest.approx(0.86, abs=0.005)
    for variant in ("attn_residual", "oasis"):
        assert max(ratios(full, variant)) < 10
        assert 0.1 < min(values(sink, variant)) < max(values(sink, variant)) < 0.61
    means = {v: geometric_mean(values(f"task.error@{full}", v)) for v in results.plan.variants}
    assert min(means, key=means.__getitem__) == "oasis"
    change = means["oasis"] / means["attn_residual"] - 1
    assert change == pytest.approx(-0.32, abs=0.005)
    errors = {v: geometric_mean(values("task.error", v)) for v in results.plan.variants}
    assert {*sorted(errors, key=errors.__getitem__)[:3]} == {"oasis", "attn_residual", "sum_key_c4"}


def test_what_the_page_says_of_massive_activations_in_a_language() -> None:
    results, values = of_seeds("massive-words", 6)
    variants = set(results.plan.variants)

    def ratios(scheme: str, variant: str) -> list[float]:
        return values(f"task.error_ratio@{scheme}", variant)

    full, linear = "w8a8-static-full", "w8a8-static-linear"
    largest, sink = "outlier.max_inf_norm_layer", "sink.idle_largest"
    for variant in variants:
        massive = sum(map(bool, values("outlier.massive", variant)))
        assert massive == (5 if variant == "vanilla" else 0)
    ordinary, *massive_ones = sorted(values(largest, "vanilla"))
    assert 83.5 < ordinary < 84.5
    assert [massive_ones[0], massive_ones[-1]] == pytest.approx([122, 582], abs=0.5)
    assert min(values("outlier.max_over_median", "vanilla")) > 1000
    assert min(ratios(full, "vanilla")) > 2200
    assert [min(ratios(linear, "vanilla")), max(ratios(linear, "vanilla"))] == pytest.approx(
        [52.6, 161.6], abs=0.1
    )
    assert 25 < min(ratios("w4a4", "vanilla")) < max(ratios("w4a4", "vanilla")) < 45
    assert max(ratios("w8a8-dynamic", "vanilla")) < 1.3
    weak = [ratios(full, variant) for variant in ("gated_attention", "softmax1")]
    assert 36 < min(map(min, weak)) < max(map(max, weak)) < 1800
    y_BTN = TriggerWordsTask(length=32).batch(256, torch.Generator().manual_seed(0)).y_BTN[:, 1:]
    uniform = float((torch.special.xlogy(y_BTN, y_BTN).sum(-1) + log(y_BTN.shape[-1])).mean())
    assert uniform == pytest.approx(1.9, abs=0.01)
    assert abs(fmean(values(f"task.error@{full}", "vanilla")) / uniform - 1) < 0.03
    published = [*zip(values(largest, "softmax1"), values(sink, "softmax1"), strict=True)]
    assert min(published) == (pytest.approx(4.3, abs=0.05), pytest.approx(0.75, abs=0.005))
    assert max(sink for _, sink in published) == min(published)[1]
    for variant in ("gated_attention", "softmax1"):
        assert 4 < min(values(largest, variant)) < max(values(largest, variant)) < 37
    assert max(values(sink, "softmax1_log")) < 0.02
    assert max(values(largest, "softmax1_log")) < 3.1
    assert 8.6 < min(ratios(full, "softmax1_log")) < max(ratios(full, "softmax1_log")) < 34.5
    assert max(ratios(full, "unit_key_c4")) < 9
    assert max(values(sink, "unit_key_c4")) == pytest.approx(0.08, abs=0.005)
    for name in ("task.error", f"task.error@{full}", "task.error@w4a4", "outlier.max_over_median"):
        means = {variant: geometric_mean(values(name, variant)) for variant in variants}
        assert min(means, key=means.__getitem__) == "unit_key_c4"
    routed = [ratios(full, variant) for variant in ("attn_residual", "oasis")]
    assert [f(each) for each in routed for f in (min, max)] == pytest.approx(
        [4.9, 16.4, 5.1, 160.1], abs=0.1
    )
    assert sum(map(lt, *routed)) == 5
    for variant in ("attn_residual", "oasis"):
        assert 0.4 < min(values(sink, variant)) < max(values(sink, variant)) < 0.9
    rest = [ratios(linear, variant) for variant in variants - {"vanilla", "softmax1"}]
    assert 1.2 < min(map(min, rest)) < max(map(max, rest)) < 4.1
    assert max(ratios(linear, "softmax1")) == pytest.approx(7.2, abs=0.05)


def test_what_the_page_says_of_the_vector_of_the_first_token() -> None:
    record = Record.load(lab_page.RESULTS / "lab" / "first_token_vector" / "record.json")
    runs = record.tables["runs"]
    assert all(run["largest_of_others"] < 0.9 for run in runs)
    words, massive = (
        [run for run in runs if run["plan"] == plan]
        for plan in ("necessity-words", "massive-words")
    )
    *spread, aligned = sorted(words, key=lambda run: run["share_of_one"])
    assert len(spread) == 5
    assert all(29 < run["norm_over_others"] < 52 for run in spread)
    assert all(run["share_of_one"] < 0.52 and run["largest_over_median"] < 1000 for run in spread)
    assert aligned["share_of_one"] > 0.95
    assert aligned["largest"] > 100
    assert aligned["largest_over_median"] > 1000
    assert len(massive) == 6
    assert all(98 < run["norm_over_others"] < 631 for run in massive)
    assert all(run["share_of_four"] > 0.8 for run in massive)


def test_what_the_page_says_of_language_models() -> None:
    results, values = of_seeds("majority", 6)
    sink, perplexity, accuracy = "sink.max_mass", "perplexity.windowed", "majority.accuracy"
    full, four = f"{perplexity}@w8a8-static-full", f"{perplexity}@w4a4"

    def mean(name: str, variant: str) -> float:
        return fmean(values(name, variant))

    def change(name: str, variant: str, baseline: str) -> float:
        return mean(name, variant) / mean(name, baseline) - 1

    def costs(variant: str) -> list[float]:
        pairs = zip(values(full, variant), values(perplexity, variant), strict=True)
        return [after / before - 1 for after, before in pairs]

    keys = ("unit_key_c4", "unit_key_c4_beta", "sum_key_c4")
    sinks = [mean(sink, variant) for variant in keys]
    assert (min(sinks), max(sinks)) == pytest.approx((0.07, 0.11), abs=0.005)
    assert max(max(values(sink, variant)) for variant in keys) == pytest.approx(0.16, abs=0.005)
    (metric,) = (metric for metric in results.metrics if metric.name == perplexity)
    for variant in keys:
        assert abs(change(perplexity, variant, "vanilla")) < 0.01 < results.noise_floor(metric)[0]
    for name in (perplexity, full, four):
        assert min(results.plan.variants, key=lambda each: mean(name, each)) == "sum_key_c4"
        assert -0.0075 < change(name, "sum_key_c4", "vanilla") < -0.003
        assert change(name, "sum_key_c4", "unit_key_c4") == pytest.approx(-0.01, abs=0.001)
    assert max(costs("sum_key_c4")) < 0.0035
    assert mean(sink, "softpick") < 0.1
    assert change(perplexity, "softpick", "vanilla") < 0.005
    assert change(accuracy, "softpick", "vanilla") > 0
    assert fails_none(results) == ["unit_key_c4_beta"]
    for variant in ("unit_key_c4", "sum_key_c4"):
        missed = [each for each in check_criteria(results, variant) if each.outcome == NOT_MET]
        assert all("kurtosis against softpick" in each.text for each in missed)
        assert 0 < max(each.change for each in missed) < 0.1
    assert max(values(sink, "softmax1_log")) < 0.1
    pairs = zip(values(accuracy, "softmax1_log"), values(accuracy, "vanilla"), strict=True)
    assert sum(answered < vanilla for answered, vanilla in pairs) == 5
    lost = mean(accuracy, "vanilla") - mean(accuracy, "softmax1_log")
    assert lost == pytest.approx(0.02, abs=0.001)
    assert mean(accuracy, "softmax1_c8") == pytest.approx(0.63, abs=0.005)
    assert mean(accuracy, "vanilla") == pytest.approx(0.99, abs=0.005)
    assert change(perplexity, "unit_key", "vanilla") == pytest.approx(0.07, abs=0.005)
    assert all(map(gt, values(perplexity, "unit_key"), values(perplexity, "vanilla")))
    assert mean(accuracy, "unit_key") < mean(accuracy, "vanilla")
    assert mean(sink, "unit_softmax") == pytest.approx(0.96, abs=0.005)
    signal = change(perplexity, "unit_key_c4_beta", "unit_key_c4")
    assert signal == pytest.approx(0.001, abs=0.0005)
    assert max(costs("unit_key_c4_beta")) == pytest.approx(0.08, abs=0.006)
    assert max(costs("vanilla")) < 0.0105
    *little, much = sorted(costs("oasis"))
    assert max(little) < 0.0105
    assert much == pytest.approx(0.28, abs=0.005)
    fine = [mean(perplexity, x) for x in ("vanilla", "gated_attention", "softpick", "oasis")]
    assert max(fine) < 1.01 * min(fine)
    for variant in results.plan.variants:
        assert not any(values("outlier.massive", variant))


def test_what_the_page_says_of_the_mix_with_real_text() -> None:
    results, values = of_seeds("majority-text", 6)
    full, four = "w8a8-static-full", "w4a4"
    sink, perplexity = "sink.max_mass", "perplexity.windowed"
    accuracy, loss = "majority.accuracy", "majority.answer_loss"

    def costs(name: str, scheme: str, variant: str) -> list[float]:
        pairs = zip(values(f"{name}@{scheme}", variant), values(name, variant), strict=True)
        return [after / before - 1 for after, before in pairs]

    def best(name: str) -> list[str]:
        return sorted(results.plan.variants, key=lambda each: fmean(values(name, each)))

    ranges = {
        variant: (min(values(sink, variant)), max(values(sink, variant)))
        for variant in ("vanilla", "softmax1", "oasis")
    }
    assert ranges["vanilla"] == pytest.approx((0.324, 0.441), abs=0.001)
    assert ranges["softmax1"] == pytest.approx((0.222, 0.318), abs=0.001)
    assert ranges["oasis"] == pytest.approx((0.287, 0.424), abs=0.001)
    assert max(values(sink, "softmax1_log") + values(sink, "sum_key_c4")) < 0.054
    of_perplexity, of_loss = (costs(name, full, "vanilla") for name in (perplexity, loss))
    assert 0.01 < min(of_perplexity) < max(of_perplexity) < 0.031
    assert 0.065 < min(of_loss) < max(of_loss) < 0.365
    of_null_key = costs(loss, full, "sum_key_c4")
    assert 0.1 < min(of_null_key) < max(of_null_key) < 0.365
    assert fmean(of_null_key) > fmean(of_loss)
    assert max(costs(perplexity, full, "oasis")) < 0.01
    assert max(costs(loss, full, "oasis")) < 0.05
    routed = {"oasis", "unit_key_c4", "unit_key_c4_beta"}
    assert {*best("outlier.max_inf_norm_layer")[:3]} == routed
    change = fmean(values(f"{perplexity}@{four}", "oasis")) / fmean(
        values(f"{perplexity}@{four}", "vanilla")
    )
    assert change == pytest.approx(0.97, abs=0.001)
    unquantized = fmean(values(perplexity, "oasis")) / fmean(values(perplexity, "vanilla"))
    assert unquantized == pytest.approx(0.99, abs=0.002)
    in_four = [fmean(values(f"{perplexity}@{four}", x)) for x in ("oasis", "gated_attention")]
    assert in_four[0] / in_four[1] == pytest.approx(1, abs=0.003)
    for name in (loss, f"{loss}@{full}"):
        assert fmean(values(name, "sum_key_c4")) < fmean(values(name, "vanilla"))
    for name in (perplexity, f"{perplexity}@{full}"):
        assert best(name)[0] == "gated_attention"
    for name in (accuracy, f"{accuracy}@{full}", f"{accuracy}@{four}"):
        assert best(name)[-2:] == ["gated_attention", "softpick"]
    (metric,) = (metric for metric in results.metrics if metric.name == perplexity)
    for variant, increase in {"unit_key_c4": 0.022, "unit_key_c4_beta": 0.030}.items():
        ratios = map(truediv, values(perplexity, variant), values(perplexity, "vanilla"))
        change = geometric_mean(ratios) - 1
        assert change == pytest.approx(increase, abs=0.001)
        assert change > results.noise_floor(metric)[0]
    for variant, name in {"gated_attention": perplexity, "softpick": accuracy}.items():
        found = {
            each.metric.name: each.p_holm
            for each in results.comparisons(variant)
            if each.baseline == "vanilla"
        }
        assert max(found[each] for each in (name, f"{name}@{full}", f"{name}@{four}")) < 0.05
    assert max(values(sink, "softpick")) < 0.13
    for variant in ("softmax1", "oasis"):
        failed = {e.text for e in check_criteria(results, variant) if e.outcome == NOT_MET}
        assert len(failed) == 1
        assert "largest sink" in failed.pop()
    worst, second, *_ = sorted(values(accuracy, "unit_key_c4"))
    assert worst < 0.25
    assert second > 0.74
    assert fails_none(results) == ["softmax1_log"]
    assert fmean(costs(perplexity, full, "sum_key_c4")) == pytest.approx(0.021, abs=0.001)
    changes = [
        fmean(values(name, "unit_key_c4_beta")) / fmean(values(name, "unit_key_c4")) - 1
        for name in (perplexity, f"{perplexity}@{full}", f"{perplexity}@{four}")
    ]
    assert [min(changes), max(changes)] == pytest.approx([0.003, 0.010], abs=0.0005)
    found = [costs(loss, full, each) for each in ("unit_key_c4_beta", "unit_key_c4")]
    assert [f(each) for each in found for f in (min, max)] == pytest.approx(
        [0.025, 0.195, 0.035, 0.691], abs=0.001
    )


def test_what_the_page_says_of_one_seed_of_real_text() -> None:
    results = lab_page.published("language")
    assert results is not None
    known = {metric.name: metric for metric in results.metrics}

    def value(name: str, variant: str) -> float:
        (found,) = results.values(known[name], variant).values()
        return found

    def cost(variant: str) -> float:
        quantized = value("perplexity.windowed@w8a8-static-full", variant)
        return quantized / value("perplexity.windowed", variant)

    largest = {each: value("outlier.max_inf_norm_layer", each) for each in results.plan.variants}
    assert largest.pop("oasis") < 58 < 2 * 58 < min(largest.values())
    assert cost("vanilla") < 1.01
    assert cost("softmax1_log") < 1.02
    assert cost("attn_residual") > 1.2
    assert cost("oasis") > 2.7
    assert cost("sum_key") > 20
