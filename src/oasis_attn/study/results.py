"""The values that a study measured, by variant and condition, and comparisons of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean

from oasis_attn.records import TrialRecord
from oasis_attn.study.plan import Condition, Plan, Trial
from oasis_attn.study.statistics import Comparison, compare, holm, noise_floor
from oasis_attn.study.study_metrics import StudyMetric, study_metrics

BASELINE_MEAN = "baseline mean"
"""The name of the mean of several baselines in tables."""


@dataclass(frozen=True, kw_only=True)
class MetricComparison:
    """One metric of a variant, compared with a baseline.

    Attributes:
        metric: the metric.
        variant: name of the variant in the plan.
        baseline: name of the other variant, or `BASELINE_MEAN`.
        comparison: the statistics.
        p_holm: p-value with Holm's correction for all comparisons of the table.
        noise_floor: relative change that a different seed alone causes.
        noise_pairs: number of pairs that the noise floor was estimated from.
    """

    metric: StudyMetric
    variant: str
    baseline: str
    comparison: Comparison
    p_holm: float
    noise_floor: float
    noise_pairs: int


@dataclass(frozen=True)
class Results:
    """The records of a study.

    Attributes:
        plan: the plan of the study.
        records: the record of each finished trial.
    """

    plan: Plan
    records: Mapping[Trial, TrialRecord]

    @cached_property
    def _values(self) -> dict[tuple[str, str], dict[Condition, float]]:
        """(metric name, variant) -> condition -> value, for all whole-model metrics."""
        found: dict[tuple[str, str], dict[Condition, float]] = {}
        for trial, record in self.records.items():
            for metric in record.metrics:
                if not metric.where:
                    values = found.setdefault((metric.name, trial.variant), {})
                    values[trial.condition] = metric.value
        return found

    @cached_property
    def metrics(self) -> tuple[StudyMetric, ...]:
        """The metrics that at least one record has."""
        named = {name for name, _ in self._values}
        return tuple(m for m in study_metrics(self.plan.schemes) if m.name in named)

    def values(self, metric: StudyMetric, variant: str) -> dict[Condition, float]:
        """The metric of a variant in each condition, in the plan's order, without noise seeds."""
        found = self._values.get((metric.name, variant), {})
        return {condition: v for condition, v in found.items() if condition.seed in self.plan.seeds}

    def noise_floor(self, metric: StudyMetric) -> tuple[float, int]:
        """`statistics.noise_floor` of the reference, with all its seeds.

        Runs are paired within each corpus and size.
        """
        groups: dict[tuple[str, str], list[float]] = {}
        values = self._values.get((metric.name, self.plan.reference), {})
        for condition, value in values.items():
            groups.setdefault((condition.corpus, condition.size), []).append(value)
        return noise_floor(groups.values(), metric.scale)

    def compare(
        self, metric: StudyMetric, variant: str, baselines: Sequence[str]
    ) -> Comparison | None:
        """Compare a variant with a baseline, or with the mean of several in each condition.

        Only conditions that all of these variants have are used; None if there are none.
        """
        tables = [self.values(metric, name) for name in (variant, *baselines)]
        conditions = [each for each in tables[0] if all(each in table for table in tables)]
        if not conditions:
            return None
        means = [fmean(table[each] for table in tables[1:]) for each in conditions]
        return compare([tables[0][each] for each in conditions], means, metric.scale)

    def comparisons(self, variant: str) -> list[MetricComparison]:
        """Compare a variant with each baseline of the plan and, from two on, with their mean.

        There is one comparison for each metric that has a better direction and that both have
        values of.  Their p-values are corrected together.
        """
        baselines = self.plan.compare[variant]
        groups: dict[str, tuple[str, ...]] = {name: (name,) for name in baselines}
        if len(baselines) > 1:
            groups[BASELINE_MEAN] = tuple(baselines)
        found = []
        for metric in self.metrics:
            if not metric.better:
                continue
            floor, pairs = self.noise_floor(metric)
            for baseline, names in groups.items():
                comparison = self.compare(metric, variant, names)
                if comparison is not None:
                    found.append(
                        MetricComparison(
                            metric=metric, variant=variant, baseline=baseline,
                            comparison=comparison, p_holm=comparison.p,
                            noise_floor=floor, noise_pairs=pairs,
                        )
                    )  # fmt: skip
        corrected = holm(each.p_holm for each in found)
        return [replace(each, p_holm=p) for each, p in zip(found, corrected, strict=True)]
