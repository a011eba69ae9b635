"""The values that a study measured, by variant and condition, and comparisons of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean

from oasis_attn.records import TrialRecord
from oasis_attn.study.plan import Condition, Plan, Trial
from oasis_attn.study.plan_claims import layers_of
from oasis_attn.study.statistics import Comparison, compare, holm, log_slope, noise_floor
from oasis_attn.study.study_metrics import StudyMetric, residual_form, study_metrics

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

    def residual_form(self, variant: str) -> str | None:
        """The residual form of a variant's models; None if none is finished."""
        return self._residual_forms.get(variant)

    def same_form(self, variant: str, other: str) -> bool:
        """Whether finished models of both variants have the same residual form."""
        return self.residual_form(variant) == self.residual_form(other)

    @cached_property
    def _residual_forms(self) -> dict[str, str]:
        return {
            trial.variant: residual_form(record.model.config or {})
            for trial, record in self.records.items()
        }

    def slopes(self, metric: StudyMetric, variant: str) -> dict[Condition, float]:
        """The slope of log metric against log layers of each corpus and seed (a cluster).

        Only clusters with a value for every size of the plan are used.  The size of their
        condition is empty.
        """
        values = self.values(metric, variant)
        layers = {size: layers_of(size) for size in self.plan.sizes}
        found = {}
        for corpus in self.plan.corpora:
            for seed in self.plan.seeds:
                cluster = [values.get(Condition(corpus, size, seed)) for size in layers]
                ys = [value for value in cluster if value is not None]
                if len(ys) == len(layers):
                    slope = log_slope(list(layers.values()), ys)
                    found[Condition(corpus, "", seed)] = slope
        return found

    def compare_slopes(
        self,
        metric: StudyMetric,
        variant: str,
        baselines: Sequence[str],
        margin: float | None = None,
    ) -> Comparison | None:
        """Compare the slopes of a variant with the mean of those of baselines, or with 0."""
        tables = [self.slopes(metric, name) for name in (variant, *baselines)]
        return _paired(tables, "difference", margin)

    def noise_floor(self, metric: StudyMetric, baselines: Sequence[str] = ()) -> tuple[float, int]:
        """`statistics.noise_floor` of the reference, with all its seeds.

        If the reference lacks the metric, it is the largest of the floors of `baselines`.  Runs are
        paired within each corpus and size.
        """
        names: tuple[str, ...] = (self.plan.reference,)
        if (metric.name, *names) not in self._values:
            names = tuple(baselines) or names
        floors = [self._noise_floor_of(metric, name) for name in names]
        return max(floors, key=lambda floor: -math.inf if math.isnan(floor[0]) else floor[0])

    def _noise_floor_of(self, metric: StudyMetric, variant: str) -> tuple[float, int]:
        groups: dict[tuple[str, str], list[float]] = {}
        for condition, value in self._values.get((metric.name, variant), {}).items():
            groups.setdefault((condition.corpus, condition.size), []).append(value)
        return noise_floor(groups.values(), metric.scale)

    def compare(
        self,
        metric: StudyMetric,
        variant: str,
        baselines: Sequence[str],
        margin: float | None = None,
    ) -> Comparison | None:
        """Compare a variant with a baseline, or with the mean of several in each condition.

        Only conditions that all of these variants have are used; None if there are none.
        """
        tables = [self.values(metric, name) for name in (variant, *baselines)]
        return _paired(tables, metric.scale, margin)

    def comparisons(self, variant: str) -> list[MetricComparison]:
        """Compare a variant with each baseline of the plan and, from two on, with their mean.

        There is one comparison for each metric that has a better direction and that both have
        values of.  A metric that depends on the residual form is compared only with baselines of
        the same form.  The p-values are corrected together.
        """
        found = []
        for metric in self.metrics:
            if not metric.better:
                continue
            baselines = [
                name
                for name in self.plan.compare[variant]
                if not metric.within_form or self.same_form(variant, name)
            ]
            groups: dict[str, tuple[str, ...]] = {name: (name,) for name in baselines}
            if len(baselines) > 1:
                groups[BASELINE_MEAN] = tuple(baselines)
            for baseline, names in groups.items():
                floor, pairs = self.noise_floor(metric, names)
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


def _paired(
    tables: Sequence[Mapping[Condition, float]], scale: str, margin: float | None
) -> Comparison | None:
    """Compare the first table with the mean of the others (0 without others) by condition."""
    conditions = [each for each in tables[0] if all(each in table for table in tables)]
    if not conditions:
        return None
    others = tables[1:]
    means = [fmean(table[each] for table in others) if others else 0.0 for each in conditions]
    return compare([tables[0][each] for each in conditions], means, scale, margin)
