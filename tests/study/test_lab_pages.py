"""What docs/lab.md and docs/null.md say of the studies is what their records show."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from operator import lt
from statistics import fmean, geometric_mean

import pytest

import lab_page
from oasis_attn.records import Record
from oasis_attn.study.criteria import NOT_MET, check_criteria, fails_none
from oasis_attn.study.results import Results


def test_what_the_page_says_of_the_formats_of_hardware() -> None:
    results = lab_page.published("formats")
    assert results is not None
    known = {metric.name: metric for metric in results.metrics}

    def ratios(scheme: str, variant: str) -> list[float]:
        return [*results.values(known[f"task.error_ratio@{scheme}"], variant).values()]

    assert len(ratios("nvfp4", "vanilla")) == 3
    for sink, null in zip(
        *(ratios("w8a8-static-full", each) for each in results.plan.variants), strict=True
    ):
        assert null < sink / 2
    for scheme in ("fp8-static", "fp8-dynamic", "mxfp8", "w4a4", "mxfp4", "nvfp4"):
        for sink, null in zip(
            *(ratios(scheme, each) for each in results.plan.variants), strict=True
        ):
            assert null > sink
    for variant in results.plan.variants:
        assert fmean(ratios("nvfp4", variant)) < fmean(ratios("w4a4", variant))
        assert fmean(ratios("w4a4", variant)) < fmean(ratios("mxfp4", variant))
        eight = ("w8a8-static-linear", "fp8-static", "fp8-dynamic")
        assert max(fmean(ratios(each, variant)) for each in eight) < (
            fmean(ratios("mxfp8", variant))
        )


def _of_six_seeds(study: str) -> tuple[Results, Callable[[str, str], list[float]]]:
    """A published study, and the values of a metric for the seeds of a variant."""
    results = lab_page.published(study)
    assert results is not None
    known = {metric.name: metric for metric in results.metrics}

    def values(name: str, variant: str) -> list[float]:
        found = [*results.values(known[name], variant).values()]
        assert len(found) == 6
        return found

    return results, values


def test_what_the_page_says_of_massive_activations() -> None:
    _, values = _of_six_seeds("necessity-content")
    largest, massive = "outlier.max_inf_norm_layer", "outlier.massive"
    full, linear = (f"task.error_ratio@w8a8-static-{part}" for part in ("full", "linear"))
    assert 120 < min(values(largest, "vanilla")) < max(values(largest, "vanilla")) < 270
    assert max(values(massive, "vanilla")) > 0
    assert min(values(full, "vanilla")) > 15_000
    assert min(values(linear, "vanilla")) > 40
    *weak, strong = zip(
        values(largest, "softmax1"), values("sink.idle_largest", "softmax1"),
        values(full, "softmax1"), strict=True,
    )  # fmt: skip
    assert max(value for value, *_ in weak) < 15
    assert max(sink for _, sink, _ in weak) < 0.25
    assert strong[0] > 100
    assert strong[1] > 0.99
    assert strong[2] > 15_000
    for variant in ("gated_attention", "softmax1_c8", "attn_residual", "oasis", "unit_key"):
        assert max(values(largest, variant)) < 20
    assert max(values(full, "softmax1_c8")) > min(values(full, "gated_attention"))
    for variant in ("vanilla", "attn_residual", "gated_attention", "oasis"):
        assert min(values("sink.idle_largest", variant)) > 0.99
    for variant in ("softmax1_c8", "unit_key"):
        assert max(values("sink.idle_largest", variant)) < 0.001
    weights = Record.load(lab_page.RESULTS / "lab" / "embedding_weights" / "record.json")
    for run in weights.tables["runs"]:
        for first, others in run["weights"][1::2]:  # of attention
            assert first < 0.2 < others
    for name, factor in ((full, 5), (linear, 1.4)):
        for other in ("vanilla", "gated_attention"):
            assert factor * max(values(name, "unit_key")) < min(values(name, other))


def test_what_the_page_says_of_the_language() -> None:
    results, values = _of_six_seeds("necessity-words")

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
    results, values = _of_six_seeds("massive-words")
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
    for variant in ("gated_attention", "softmax1"):
        assert 4 < min(values(largest, variant)) < max(values(largest, variant)) < 37
    assert max(values(sink, "softmax1_log")) < 0.02
    assert max(values(largest, "softmax1_log")) < 3.1
    assert 8.6 < min(ratios(full, "softmax1_log")) < max(ratios(full, "softmax1_log")) < 34.5
    assert max(ratios(full, "unit_key_c4")) < 9
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


def test_what_the_page_says_of_the_mix_with_real_text() -> None:
    results, values = _of_six_seeds("majority-text")
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
    assert max(costs(perplexity, full, "oasis")) < 0.01
    assert max(costs(loss, full, "oasis")) < 0.05
    assert best("outlier.max_inf_norm_layer")[0] == "oasis"
    change = fmean(values(f"{perplexity}@{four}", "oasis")) / fmean(
        values(f"{perplexity}@{four}", "vanilla")
    )
    assert change == pytest.approx(0.97, abs=0.001)
    for name in (perplexity, f"{perplexity}@{full}"):
        assert best(name)[0] == "gated_attention"
    for name in (accuracy, f"{accuracy}@{full}", f"{accuracy}@{four}"):
        assert best(name)[-1] == "gated_attention"


def test_what_the_page_says_of_the_vector_of_the_first_token() -> None:
    record = Record.load(lab_page.RESULTS / "lab" / "first_token_vector" / "record.json")
    *spread, aligned = sorted(record.tables["runs"], key=lambda run: run["share_of_one"])
    assert len(spread) == 5
    assert all(30 < run["norm_over_others"] < 60 for run in spread)
    assert all(run["share_of_one"] < 0.5 and run["largest_over_median"] < 1000 for run in spread)
    assert aligned["share_of_one"] > 0.95
    assert aligned["largest"] > 100
    assert aligned["largest_over_median"] > 1000


def test_what_the_page_says_of_the_decoders_of_the_lab() -> None:
    results = lab_page.published("necessity")
    assert results is not None
    known = {metric.name: metric for metric in results.metrics}

    def mean(name: str, variant: str) -> float:
        return fmean(results.values(known[name], variant).values())

    sums = ("vanilla", "softmax1", "learned_sink", "gated_attention")
    routed = ("attn_residual", "attn_residual_gated", "oasis", "official")
    assert all(mean("sink.idle_largest", variant) > 0.9 for variant in (*sums, *routed))
    assert 0.02 < mean("sink.idle_largest", "softpick") < 0.9
    clipped = ("clipped_softmax_a2", "clipped_softmax_a4")
    assert all(mean("task.error", each) > 5 * mean("task.error", "vanilla") for each in clipped)
    strong = ("softmax1_c8", "strong", "strong_signal_off", "strong_unit", "strong_official")
    assert all(mean("sink.idle_largest", variant) < 0.02 for variant in strong)
    assert mean("sink.idle_largest", "softmax1_c4.5") < 0.05
    assert mean("sink.idle_largest", "oasis_c4.5") > 0.3
    assert 0.02 < mean("sink.idle_largest", "oasis_c6") < 0.3
    error = "task.error"
    assert mean(error, "softmax1_c8") > mean(error, "vanilla") > mean(error, "attn_residual")
    assert mean(error, "strong") < mean(error, "softmax1_c8")
    assert mean(error, "value_null_c8") < mean(error, "softmax1_c8")
    assert mean("sink.idle_largest", "softmax1_log_context") < 0.02
    assert mean("sink.idle_largest", "oasis_log_context") > 0.02
    ratio = "task.error_ratio@w8a8-static-full"
    for variant in ("softmax1_c8", "strong", "gated_attention", "attn_residual", "vanilla_unit"):
        assert mean(ratio, variant) < mean(ratio, "vanilla") / 2
    for variant in ("oasis_c4.5", "oasis_c6", "oasis_log_context"):
        assert mean(ratio, variant) > mean(ratio, "oasis") > mean(ratio, "strong")
    low = "task.error@w8a8-static-full"
    measured = [each for each in results.plan.variants if results.values(known[low], each)]
    best = sorted(measured, key=lambda each: mean(low, each))[:2]
    assert {*best} == {"attn_residual_unit", "attn_residual_gated"}
    for name in ("sink.idle", ratio):
        assert mean(name, "attn_residual") < mean(name, "vanilla")
        assert mean(name, "attn_residual") < mean(name, "depth_sigmoid_only")
    moved = "signal.output_change"
    assert all(mean(moved, variant) < 1e-4 for variant in ("oasis", "official", "strong"))
    assert mean(moved, "strong_beta") > 0.1
    without = mean(low, "strong_signal_off")
    assert abs(mean(low, "strong_beta") / without - 1) < 0.1
    assert mean(low, "strong_beta_shuffled") > 2 * without > 2 * mean(low, "strong_beta_averaged")
    kurtosis = "outlier.mean_pearson_kurtosis"
    assert mean(kurtosis, "softmax1_c8") > mean(kurtosis, "vanilla")
    assert mean(kurtosis, "strong") > mean(kurtosis, "oasis")
    four = "task.error@w4a4"
    assert mean(four, "softmax1_c8") > mean(four, "vanilla")
    assert mean(four, "strong") > mean(four, "oasis")
    weights: dict[str, list[list[float]]] = {}
    for trial, record in results.records.items():
        if "depth.weights" in record.tables:
            embedding = [router[0] for router in record.tables["depth.weights"]]
            weights.setdefault(trial.variant, []).append(embedding)
    first, published, strong = (
        [fmean(each) for each in zip(*weights[variant], strict=True)][:4]
        for variant in ("attn_residual", "oasis", "strong")
    )
    assert all(b <= a / 2 for a, b in zip(first, strong, strict=True))
    ratios = [b / a for a, b in zip(published, strong, strict=True)]
    assert [min(ratios), max(ratios)] == pytest.approx([0.3, 0.7], abs=0.05)


def test_what_the_page_says_of_growth_with_depth() -> None:
    results = lab_page.published("necessity-depth")
    assert results is not None
    known = {metric.name: metric for metric in results.metrics}

    def slope(name: str, variant: str) -> float:
        return fmean(results.slopes(known[name], variant).values())

    largest, ratio = "outlier.max_inf_norm", "task.error_ratio@w8a8-static-full"
    assert 0.45 < slope(largest, "vanilla") < 0.65
    assert 0.75 < slope(ratio, "vanilla") < 1
    assert abs(slope(largest, "softmax1_c8")) < 0.1
    assert 0.4 < slope(ratio, "softmax1_c8") / slope(ratio, "vanilla") < 0.6
    for variant in ("attn_residual", "oasis", "strong"):
        assert slope(largest, variant) < 0.1
        assert slope(ratio, variant) < 0.15
    for variant in results.plan.variants:
        assert slope("outlier.mean_pearson_kurtosis", variant) < 0.15


def test_what_the_page_says_of_a_null_that_depends_on_the_query() -> None:
    results = lab_page.published("necessity-key-null")
    assert results is not None
    known = {metric.name: metric for metric in results.metrics}
    sink, error, kurtosis = "sink.idle_largest", "task.error", "outlier.mean_pearson_kurtosis"
    eight, four = "task.error@w8a8-static-full", "task.error@w4a4"

    def values(name: str, variant: str) -> list[float]:
        return list(results.values(known[name], variant).values())

    def change(name: str, variant: str, baseline: str) -> float:
        return geometric_mean(values(name, variant)) / geometric_mean(values(name, baseline)) - 1

    assert fails_none(results) == ["unit_key", "unit_key_signal", "unit_key_beta"]
    assert all(max(values(sink, variant)) < 0.001 for variant in fails_none(results))
    for name in (error, four):
        assert -0.36 < change(name, "unit_key", "gated_attention") < -0.3
    assert change(eight, "unit_key", "gated_attention") < -0.5
    for variant in ("unit_constant", "unit_key_slow"):
        assert change(four, variant, "gated_attention") > 1
    for variant in ("unit_learned", "unit_key_weak"):
        assert fmean(values(sink, variant)) > 0.3
    for variant in ("sum_key", "depth_key"):
        assert change(eight, variant, "gated_attention") > 0.5
    for name in (error, eight, four):
        assert abs(change(name, "unit_key_signal", "unit_key")) < 0.03
    for name in (kurtosis, four):
        assert -0.15 < change(name, "unit_key_beta", "unit_key") < -0.05
        assert change(name, "unit_key_beta_averaged", "unit_key") < 0
    rates = results.plan.variants["unit_key"]["training"]["learning_rates"]
    assert 30 < rates["null"] / results.plan.training["learning_rate"] < 35


def test_what_the_page_says_of_language_models() -> None:
    results = lab_page.published("majority")
    assert results is not None
    known = {metric.name: metric for metric in results.metrics}

    def mean(name: str, variant: str) -> float:
        return fmean(results.values(known[name], variant).values())

    perplexity, accuracy = "perplexity.windowed", "majority.accuracy"
    assert mean("sink.max_mass", "unit_key") < 0.1
    assert 1.08 < mean(perplexity, "unit_key") / mean(perplexity, "vanilla") < 1.12
    assert mean(accuracy, "unit_key") < mean(accuracy, "vanilla")
    assert mean("sink.max_mass", "softpick") < 0.1
    assert mean(perplexity, "softpick") < mean(perplexity, "vanilla") * 1.005
    assert mean(accuracy, "softpick") > 0.98
    for variant in ("softmax1_c8", "unit_constant"):
        assert mean(accuracy, variant) < 2 / 3 < mean(accuracy, "unit_key")
        assert mean(perplexity, variant) > mean(perplexity, "unit_key")
    assert mean(f"{perplexity}@w8a8-static-full", "vanilla") < 1.01 * mean(perplexity, "vanilla")
    fine = [mean(perplexity, x) for x in ("vanilla", "gated_attention", "softpick", "oasis")]
    assert max(fine) < 1.01 * min(fine)

    no_sink = {"unit_key_c4", "unit_key_c4_beta", "sum_key_c4"}
    assert set(fails_none(results)) == no_sink
    for variant in no_sink:
        assert mean("sink.max_mass", variant) < 0.105
        assert mean(perplexity, variant) < 1.005 * mean(perplexity, "vanilla")
    others = {x for x in results.plan.variants if mean("sink.max_mass", x) < 0.2} - {"sum_key_c4"}
    assert others > {"softpick", "unit_key"}
    for scheme in ("", "@w8a8-static-full", "@w4a4"):
        metric = known[perplexity + scheme]
        best = results.values(metric, "sum_key_c4")
        for variant in {*others, "vanilla"}:
            rest = results.values(metric, variant)
            assert best.keys() == rest.keys()
            assert all(best[place] < rest[place] for place in best)
    assert 0.94 < mean("sink.max_mass", "unit_softmax") < 0.955
    assert mean("outlier.max_inf_norm", "vanilla") < 100  # massive activations are larger


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


def test_what_the_page_says_of_stronger_signals() -> None:
    results = lab_page.published("necessity-win")
    assert results is not None
    known = {metric.name: metric for metric in results.metrics}
    sink, error, kurtosis = "sink.idle_largest", "task.error", "outlier.mean_pearson_kurtosis"
    eight, four, ratio = (
        "task.error@w8a8-static-full", "task.error@w4a4", "task.error_ratio@w8a8-static-full",
    )  # fmt: skip

    def values(name: str, variant: str) -> list[float]:
        return list(results.values(known[name], variant).values())

    def change(name: str, variant: str, baseline: str) -> float:
        return geometric_mean(values(name, variant)) / geometric_mean(values(name, baseline)) - 1

    assert not fails_none(results)
    nearest = check_criteria(results, "strong_signal_off")
    missed = [each.text for each in nearest if each.outcome == NOT_MET]
    assert missed
    assert all("w4a4" in text for text in missed)
    assert 1.5 < change(four, "strong_signal_off", "gated_attention") < 2.5
    assert -0.6 < change(ratio, "unit_signal_off", "strong_signal_off") < -0.45
    assert change(four, "unit_signal_off", "sum_unit") < -0.4
    for variant in ("unit", "unit_beta"):
        assert abs(change(eight, variant, "unit_signal_off")) < 0.05
        assert abs(change(kurtosis, variant, "unit_signal_off")) < 0.05
    assert change(kurtosis, "silence_mlp", "unit_signal_off") < -0.6
    assert change(four, "silence_mlp", "unit_signal_off") < -0.6
    assert 0.4 < change(error, "silence_mlp", "unit_signal_off") < 0.45
    assert abs(change(kurtosis, "silence_mlp", "silence_mlp_shuffled")) < 0.15
    assert abs(change(four, "silence_mlp", "silence_mlp_shuffled")) < 0.15
    assert round(change(error, "rms_silence", "rms_signal_off"), 2) == -0.29
    assert max(values(sink, "rms_silence")) > 0.5
    assert [round(extreme(values(ratio, "rms_silence"))) for extreme in (min, max)] == [2, 76]
    silenced, without = (
        values(sink, f"rms_{each}") for each in ("silence_attention", "signal_off")
    )
    assert all(a < b for a, b in zip(silenced, without, strict=True))
    assert -0.8 < change(ratio, "rms_silence_attention", "rms_signal_off") < -0.7
