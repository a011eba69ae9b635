"""What docs/lab.md and docs/null.md say of studies of tasks is what their records show."""

from __future__ import annotations

from dataclasses import replace
from operator import lt
from statistics import fmean, geometric_mean

import pytest

import lab_page
from oasis_attn.records import Record
from oasis_attn.study.criteria import NOT_MET, check_criteria, fails_none
from oasis_attn.study.results import Results
from oasis_attn.study.verdict import judge
from study.published import of_seeds


def test_what_the_page_says_of_the_formats_of_hardware() -> None:
    results, values = of_seeds("formats", 3)

    def ratios(scheme: str, variant: str) -> list[float]:
        return values(f"task.error_ratio@{scheme}", variant)

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


def test_what_the_page_says_of_massive_activations() -> None:
    _, values = of_seeds("necessity-content", 10)
    largest, massive = "outlier.max_inf_norm_layer", "outlier.massive"
    full, linear = (f"task.error_ratio@w8a8-static-{part}" for part in ("full", "linear"))
    assert 128 < min(values(largest, "vanilla")) < max(values(largest, "vanilla")) < 394
    assert max(values(massive, "vanilla")) > 0
    assert min(values(full, "vanilla")) > 15_000
    assert min(values(linear, "vanilla")) > 40
    names = ("sink.idle_largest", largest, full)
    *weak, medium, strong = sorted(zip(*(values(name, "softmax1") for name in names), strict=True))
    assert len(weak) == 8
    assert max(value for _, value, _ in weak) < 15
    assert max(sink for sink, *_ in weak) < 0.335
    assert medium[:2] == pytest.approx((0.84, 18), abs=0.05)
    assert strong[0] > 0.99
    assert strong[1] > 100
    assert strong[2] > 15_000
    for variant in ("gated_attention", "softmax1_c8", "attn_residual", "oasis", "unit_key"):
        assert max(values(largest, variant)) < 20
    strong_null, gate = (values(full, variant) for variant in ("softmax1_c8", "gated_attention"))
    assert sum(map(lt, strong_null, gate)) == 9
    assert geometric_mean(strong_null) / geometric_mean(gate) == pytest.approx(0.2, abs=0.005)
    for variant in ("vanilla", "attn_residual", "gated_attention", "oasis"):
        assert min(values("sink.idle_largest", variant)) > 0.99
    for variant in ("softmax1_c8", "unit_key"):
        assert max(values("sink.idle_largest", variant)) < 0.001
    weights = Record.load(lab_page.RESULTS / "lab" / "embedding_weights" / "record.json")
    for run in weights.tables["runs"]:
        for first, others in run["weights"][1::2]:  # of attention
            assert first < 0.2 < others
    place = values(full, "softmax1").index(medium[-1])
    for name in (full, linear):
        assert 0.2 < values(name, "softmax1")[place] / values(name, "vanilla")[place] < 0.33
    for name, factor in ((full, 8), (linear, 1.8)):
        for other in ("vanilla", "gated_attention"):
            pairs = zip(values(name, "unit_key"), values(name, other), strict=True)
            assert all(factor * ours < theirs for ours, theirs in pairs)


def test_what_the_page_says_of_the_decoders_of_the_lab() -> None:
    results, values = of_seeds("necessity", 10)

    def mean(name: str, variant: str) -> float:
        return fmean(values(name, variant))

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
    assert mean("sink.idle_largest", "oasis_log") > 0.02
    ratio = "task.error_ratio@w8a8-static-full"
    for variant in ("softmax1_c8", "strong", "gated_attention", "attn_residual", "vanilla_unit"):
        assert mean(ratio, variant) < mean(ratio, "vanilla") / 2
    for variant in ("oasis_c4.5", "oasis_c6", "oasis_log"):
        assert mean(ratio, variant) > mean(ratio, "oasis") > mean(ratio, "strong")
    low = "task.error@w8a8-static-full"
    best = sorted(results.plan.variants, key=lambda each: mean(low, each))[:2]
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
    in_four_bits = "task.error_ratio@w4a4"
    costs = [
        [mean(name, variant) / mean(name, "vanilla") for name in (error, in_four_bits)]
        for variant in ("softmax1_log_context", "softmax1_c8")
    ]
    assert all(1.45 < of_error < 1.55 for of_error, _ in costs)
    assert [ratio for _, ratio in costs] == pytest.approx([1.5, 2.7], abs=0.1)
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

    def means(name: str, variant: str) -> list[float]:
        """From 1 to 16 layers."""
        found = results.values(known[name], variant)
        sizes = (f"lab-{layers}" for layers in (1, 2, 4, 8, 16))
        return [
            geometric_mean(value for condition, value in found.items() if condition.size == size)
            for size in sizes
        ]

    error, quantized = means("task.error", "vanilla"), "task.error@w8a8-static-full"
    assert means(largest, "vanilla")[::4] == pytest.approx([4.9, 34.5], abs=0.1)
    assert means(quantized, "vanilla")[::4] == pytest.approx([7e-5, 9e-4], abs=5e-5)
    *_, ratio_8, ratio_16 = ratios = means(ratio, "vanilla")
    assert 5 < ratio_8 / ratios[0] < 5.5
    assert ratio_16 / ratio_8 < 1
    assert 2.5 < error[-1] / error[-2] < 3
    assert means(largest, "softmax1_c8")[-1] == pytest.approx(7, abs=0.2)
    plan = replace(results.plan, sizes=results.plan.sizes[:-1])
    fewer = Results(plan, {trial: results.records[trial] for trial in plan.trials})
    outcomes, before = (
        {each.claim.name: [test.outcome for test in each.results] for each in judge(study)}
        for study in (results, fewer)
    )
    assert outcomes["growth"] == before["growth"] == ["passed", "inconclusive", "passed"]
    assert outcomes["growth_depth_routing"] == before["growth_depth_routing"]
    assert before["growth_strong_null_sum"] == ["passed", "inconclusive", "passed"]
    assert outcomes["growth_strong_null_sum"] == ["passed", "inconclusive", "inconclusive"]
    assert before["growth_strong_null_depth"] == ["failed", "inconclusive", "passed"]
    assert outcomes["growth_strong_null_depth"] == ["inconclusive"] * 3
    shares = [
        ours / theirs for ours, theirs in zip(means(ratio, "softmax1_c8"), ratios, strict=True)
    ]
    assert [shares[0], *shares[-2:]] == pytest.approx([0.39, 0.17, 0.33], abs=0.005)
    assert min(slope(name, "softpick") for name in (largest, ratio)) > 0.25
    for variant in ("attn_residual", "oasis"):
        assert 30 * means(quantized, variant)[-1] < means(quantized, "vanilla")[-1]
    for variant in ("attn_residual", "oasis", "strong"):
        assert slope(largest, variant) < 0.1
        assert slope(ratio, variant) < 0.15
    for variant in results.plan.variants:
        assert slope("outlier.mean_pearson_kurtosis", variant) < 0.15


def test_what_the_page_says_of_a_null_that_depends_on_the_query() -> None:
    results, values = of_seeds("necessity-key-null", 10)
    sink, error, kurtosis = "sink.idle_largest", "task.error", "outlier.mean_pearson_kurtosis"
    eight, four = "task.error@w8a8-static-full", "task.error@w4a4"

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


def test_what_the_page_says_of_stronger_signals() -> None:
    results, values = of_seeds("necessity-win", 10)
    sink, error, kurtosis = "sink.idle_largest", "task.error", "outlier.mean_pearson_kurtosis"
    eight, four, ratio = (
        "task.error@w8a8-static-full", "task.error@w4a4", "task.error_ratio@w8a8-static-full",
    )  # fmt: skip

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
