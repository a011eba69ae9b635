"""What a study compares: one table of measures, by their names in a cell's record."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One column of a study.

    Attributes:
        name: in the record; `NAME@SCHEME` is of the model quantised so.
        head: in tables.
        scale: how it is compared, see `statistics.compare`.
        better: `lower`, `higher`, or empty where neither is better.
    """

    name: str
    head: str
    scale: str
    better: str = ""


_PLAIN = (
    Measure(name="perplexity.windowed", head="perplexity", scale="ratio", better="lower"),
    Measure(name="outlier.max_inf_norm", head="max inf-norm", scale="ratio", better="lower"),
    Measure(name="outlier.avg_kurtosis", head="avg kurtosis", scale="ratio", better="lower"),
    Measure(name="outlier.silent_tensors", head="silent tensors", scale="points"),
    Measure(name="outlier.understated_kurtosis", head="understated kurtoses", scale="points"),
    Measure(name="outlier.mean_pearson_kurtosis", head="mean Pearson kurtosis", scale="ratio"),
    Measure(name="sink.mass", head="sink mass", scale="points", better="lower"),
    Measure(name="sink.rate@0.3", head="sink rate at 0.3", scale="points", better="lower"),
    Measure(
        name="joint.leakage_renormalised", head="joint leakage", scale="points", better="lower"
    ),
    Measure(name="null.mass", head="null mass", scale="points"),
    Measure(name="depth.sink_rate@0.3", head="depth sink rate", scale="points", better="lower"),
    Measure(name="depth.entropy_normalised", head="depth entropy / log S", scale="points"),
)
_TASKS = (
    Measure(name="arith.pass@1.strict", head="arith Pass@1", scale="points", better="higher"),
    Measure(name="gsm8k.pass@1.strict", head="GSM8K Pass@1", scale="points", better="higher"),
    Measure(
        name="gsm8k.answer_loglik", head="GSM8K log-likelihood", scale="points", better="higher"
    ),
)


def measures(schemes: tuple[str, ...]) -> tuple[Measure, ...]:
    """Every measure that a study with these schemes may have, in the order of its tables."""
    perplexity = _PLAIN[0]
    quantized = [
        Measure(
            name=f"{measure.name}@{scheme}",
            head=f"{scheme} {measure.head}",
            scale=measure.scale,
            better=measure.better,
        )
        for scheme in schemes
        for measure in (perplexity, *_TASKS)
    ]
    return *_PLAIN, *_TASKS, *quantized
