"""The figures of a study: the key metrics of all variants, and all metrics of one variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from oasis_attn.metrics import definitions
from oasis_attn.report.changes import BETTER, WORSE, Change, change_figure
from oasis_attn.report.document import Picture
from oasis_attn.study.results import MetricComparison, Results
from oasis_attn.study.statistics import exceeds, holm
from oasis_attn.study.study_metrics import StudyMetric
from oasis_attn.study.verdict import SIGNIFICANCE

_QUALITY = ("perplexity.windowed", "task.error", "majority.answer_loss")
_SINKS = ("sink.idle_largest", "sink.max_mass", "sink.mass")
_OUTLIERS = ("outlier.mean_pearson_kurtosis", "outlier.avg_kurtosis", "outlier.max_inf_norm")
_FLOOR = 0.05  # a fraction that is below it everywhere may be at floor level
_NOISE = 0.5  # and is, if a different seed alone changes it by this share


def at_floor(results: Results, metric: StudyMetric) -> bool:
    """Whether a fraction is so small that it shows no difference between variants.

    Its mean is below 0.05 in every variant, and it is 0 in the reference, or a different seed alone
    changes it by more than half.
    """
    if metric.scale != "points" or not metric.better:
        return False
    means = [
        fmean(v.values()) for name in results.plan.variants if (v := results.values(metric, name))
    ]
    noise, _ = results.noise_floor(metric)
    return all(abs(mean) < _FLOOR for mean in means) and (noise > _NOISE or not noise)


def key_metrics(results: Results) -> list[StudyMetric]:
    """At most four metrics: quality, sinks, outliers, and quality in the plan's first scheme."""
    known = {m.name: m for m in results.metrics if m.better and not at_floor(results, m)}
    quantized = [f"{name}@{scheme}" for scheme in results.plan.schemes[:1] for name in _QUALITY]
    found = []
    for names in (_QUALITY, _SINKS, _OUTLIERS, quantized):
        found += [known[name] for name in names if name in known][:1]
    return found


def key_comparisons(results: Results) -> list[MetricComparison]:
    """The key metrics of every variant against the reference; p-values are corrected together.

    A metric that depends on the residual form is compared with the reference only in variants of
    its form, and in addition with the baselines of the plan that have the form of the variant.
    """
    plan, found = results.plan, []
    for metric in key_metrics(results):
        pairs = [(name, plan.reference) for name in plan.variants if name != plan.reference]
        if metric.within_form:
            pairs += [(name, other) for name, others in plan.compare.items() for other in others]
            pairs = [pair for pair in dict.fromkeys(pairs) if results.same_form(*pair)]
        for variant, baseline in pairs:
            floor, noise_pairs = results.noise_floor(metric, [baseline])
            comparison = results.compare(metric, variant, [baseline])
            if comparison is not None:
                found.append(
                    MetricComparison(
                        metric=metric, variant=variant, baseline=baseline, comparison=comparison,
                        p_holm=comparison.p, noise_floor=floor, noise_pairs=noise_pairs,
                    )
                )  # fmt: skip
    corrected = holm(each.p_holm for each in found)
    return [replace(each, p_holm=p) for each, p in zip(found, corrected, strict=True)]


def key_pictures(results: Results, comparisons: Sequence[MetricComparison]) -> list[Picture]:
    """One figure for each key metric."""
    reference, found = results.plan.reference, []
    for metric in dict.fromkeys(each.metric for each in comparisons):
        own = [each for each in comparisons if each.metric == metric]
        labels = [
            each.variant if each.baseline == reference else f"{each.variant} / {each.baseline}"
            for each in own
        ]
        others = any(each.baseline != reference for each in own)
        slash = ", or from the variant after the slash" if others else ""
        form = " Only variants with the same residual form are compared." * metric.within_form
        figure = change_figure(
            [change(each, label) for each, label in zip(own, labels, strict=True)],
            title=f"change from {reference}; {metric.better} is better",
            columns=1,
        )
        definition = definitions(metric.name)[0].definition
        found.append(
            Picture(
                name=f"key-{metric.name}",
                title=f"{metric.label}: change from {reference} of each variant",
                caption=f"`{metric.name}`: {definition}. Change from {reference}{slash}.{form}",
                figure=figure,
            )
        )
    return found


def change_picture(results: Results, variant: str) -> Picture | None:
    """The changes of one variant from its baselines; None without a finite one.

    Metrics at floor level are left out.
    """
    drawn = changes(results, variant)
    if not drawn:
        return None
    return Picture(
        name=f"changes-{variant}",
        title=f"{variant} compared with its baselines",
        caption=f"Changes of {variant} from each baseline. Metrics at floor level are left out.",
        figure=change_figure(drawn, title=f"change of {variant}"),
    )


def changes(results: Results, variant: str) -> list[Change]:
    """The data of the figure that compares one variant with its baselines."""
    return [
        change(each, each.baseline)
        for each in results.comparisons(variant)
        if abs(each.comparison.change) < float("inf") and not at_floor(results, each.metric)
    ]


def change(each: MetricComparison, label: str) -> Change:
    """One line of a figure."""
    return Change(
        panel=each.metric.label,
        label=label,
        n=each.comparison.n,
        change=each.comparison.change,
        low=each.comparison.low,
        high=each.comparison.high,
        noise_floor=each.noise_floor,
        ratio=each.metric.scale == "ratio",
        outcome=outcome(each),
    )


def outcome(each: MetricComparison) -> str:
    """`BETTER` or `WORSE` if the change is significant and above the noise floor; else empty."""
    comparison = each.comparison
    above = exceeds(comparison, each.noise_floor, each.metric.scale)
    if not (each.p_holm < SIGNIFICANCE and above):
        return ""
    lower = comparison.difference < 0
    return BETTER if lower == (each.metric.better == "lower") else WORSE
