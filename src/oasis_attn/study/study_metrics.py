"""The metrics that a study compares, and how it compares them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TIMES = ("trial.seconds", "trial.processor_seconds")
"""Metrics of the run time of a trial; they are different in every run."""


@dataclass(frozen=True, kw_only=True)
class StudyMetric:
    """One metric of a trial that a study reports.

    Attributes:
        name: name in the record; `NAME@SCHEME` is the metric of the model quantized with SCHEME.
        label: name in tables.
        scale: `ratio` or `points`, see `statistics.compare`.
        better: `lower`, `higher`, or empty if neither is better.
        within_form: it depends on the `residual_form`, so that only variants with the same form are
            compared.  A residual sum grows with depth by construction, a weighted mean of sources
            does not, and the next norm removes the scale of both.  The kurtosis of the literature
            has a constant in its denominator and so depends on the scale, too.
    """

    name: str
    label: str
    scale: str
    better: str = ""
    within_form: bool = False


_UNQUANTIZED = (
    StudyMetric(name="perplexity.windowed", label="perplexity", scale="ratio", better="lower"),
    StudyMetric(
        name="outlier.max_inf_norm",
        label="max inf-norm",
        scale="ratio",
        better="lower",
        within_form=True,
    ),
    StudyMetric(
        name="outlier.max_inf_norm_layer",
        label="largest layer output",
        scale="ratio",
        better="lower",
        within_form=True,
    ),
    StudyMetric(
        name="outlier.massive", label="massive activations", scale="points", better="lower"
    ),
    StudyMetric(
        name="outlier.avg_kurtosis",
        label="avg kurtosis",
        scale="ratio",
        better="lower",
        within_form=True,
    ),
    StudyMetric(name="outlier.silent_tensors", label="silent tensors", scale="points"),
    StudyMetric(name="outlier.understated_kurtosis", label="understated kurtoses", scale="points"),
    StudyMetric(
        name="outlier.mean_pearson_kurtosis",
        label="mean Pearson kurtosis",
        scale="ratio",
        better="lower",
    ),
    StudyMetric(name="sink.mass", label="sink mass", scale="points", better="lower"),
    StudyMetric(name="sink.max_mass", label="largest sink", scale="points", better="lower"),
    StudyMetric(name="sink.rate@0.3", label="sink rate at 0.3", scale="points", better="lower"),
    StudyMetric(
        name="joint.leakage_renormalized", label="joint leakage", scale="points", better="lower"
    ),
    StudyMetric(name="null.mass", label="null probability", scale="points"),
    StudyMetric(
        name="depth.sink_rate@0.3", label="depth sink rate", scale="points", better="lower"
    ),
    StudyMetric(name="depth.entropy_normalized", label="depth entropy / log S", scale="points"),
)
_ON_TASK = (  # of decoders on generated tasks
    StudyMetric(name="task.error", label="task error", scale="ratio", better="lower"),
    StudyMetric(
        name="task.relative_error", label="relative task error", scale="ratio", better="lower"
    ),
    StudyMetric(name="task.error_trigger", label="error at triggers", scale="ratio"),
    StudyMetric(name="task.error_idle", label="error at idle tokens", scale="ratio"),
    StudyMetric(name="task.largest_error", label="largest error", scale="ratio", better="lower"),
    StudyMetric(name="sink.idle", label="idle sink", scale="points", better="lower"),
    StudyMetric(
        name="sink.idle_largest", label="idle sink, largest head", scale="points", better="lower"
    ),
    StudyMetric(name="sink.trigger", label="sink at triggers", scale="points"),
    StudyMetric(
        name="outlier.max_over_median",
        label="max activation over median",
        scale="ratio",
        better="lower",
        within_form=True,
    ),
    StudyMetric(name="null.idle", label="idle null", scale="points"),
    StudyMetric(name="null.trigger", label="null at triggers", scale="points"),
    StudyMetric(name="signal.beta", label="beta", scale="points"),
    StudyMetric(name="signal.weights_change", label="weights moved by the signal", scale="points"),
    StudyMetric(name="signal.output_change", label="output moved by the signal", scale="points"),
    StudyMetric(name="signal.error_change", label="error without the signal", scale="points"),
)
_ON_TASK_QUANTIZED = (
    StudyMetric(name="task.error", label="task error", scale="ratio", better="lower"),
    StudyMetric(name="task.error_increase", label="error increase", scale="points", better="lower"),
    StudyMetric(name="task.error_ratio", label="error ratio", scale="ratio", better="lower"),
)
_TASKS = (
    StudyMetric(name="arith.pass@1.strict", label="arith Pass@1", scale="points", better="higher"),
    StudyMetric(name="gsm8k.pass@1.strict", label="GSM8K Pass@1", scale="points", better="higher"),
    StudyMetric(
        name="gsm8k.answer_loglik", label="GSM8K log-likelihood", scale="points", better="higher"
    ),
    StudyMetric(
        name="majority.accuracy", label="majority accuracy", scale="points", better="higher"
    ),
    StudyMetric(
        name="majority.answer_loss", label="majority answer loss", scale="points", better="lower"
    ),
    StudyMetric(
        name="majority.other_loss", label="majority other loss", scale="points", better="lower"
    ),
)


def residual_form(config: Mapping[str, Any]) -> str:
    """The `residual` of a model's settings, with the `mix_scale`, which sets the scale of a mix."""
    scale = config.get("mix_scale", "none")
    return str(config["residual"]) + (f" with mix_scale {scale}" if scale != "none" else "")


def study_metrics(schemes: tuple[str, ...]) -> tuple[StudyMetric, ...]:
    """Every metric of a study with these quantization schemes, in the order of its tables."""
    perplexity = _UNQUANTIZED[0]
    quantized = [
        StudyMetric(
            name=f"{metric.name}@{scheme}",
            label=f"{scheme} {metric.label}",
            scale=metric.scale,
            better=metric.better,
        )
        for scheme in schemes
        for metric in (perplexity, *_TASKS, *_ON_TASK_QUANTIZED)
    ]
    return *_UNQUANTIZED, *_ON_TASK, *_TASKS, *quantized
