"""What a study found, in a few sentences computed from its records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import isfinite, isnan
from statistics import fmean, geometric_mean

from oasis_attn.report.changes import BETTER
from oasis_attn.report.tables import number
from oasis_attn.study.criteria import MET, MET_WHOLE_INTERVAL, NOT_MET, CriterionResult
from oasis_attn.study.key_figures import outcome
from oasis_attn.study.results import MetricComparison, Results
from oasis_attn.study.study_metrics import StudyMetric
from oasis_attn.study.verdict import (
    CLAIM_INCONCLUSIVE,
    CLAIM_NOT_TESTED,
    EQUIVALENT_CLAIM,
    NOT_SUPPORTED,
    SUPPORTED,
    Verdict,
)

Criteria = Mapping[str, Sequence[CriterionResult]]
_VERDICTS = (SUPPORTED, EQUIVALENT_CLAIM, NOT_SUPPORTED, CLAIM_INCONCLUSIVE)


def answers(
    results: Results,
    verdicts: Sequence[Verdict],
    criteria: Criteria,
    comparisons: Sequence[MetricComparison],
) -> list[str]:
    """Three sentences: criteria, claims, and the effect of the main variant; or what there is.

    Args:
        verdicts: the verdict on each claim.
        criteria: the criteria of each candidate that was measured.
        comparisons: the key metrics against the reference.
    """
    found = []
    if criteria:
        found.append(_on_criteria(criteria))
    if any(each.verdict != CLAIM_NOT_TESTED for each in verdicts):
        found.append(_on_claims(verdicts))
    for variant in _main_variants(results, criteria):
        own = [
            c for c in comparisons if (c.variant, c.baseline) == (variant, results.plan.reference)
        ]
        if own:
            found.append(_on_effect(variant, results.plan.reference, own))
            break
    found += [_on_best(results, each) for each in dict.fromkeys(c.metric for c in comparisons)]
    return found[:3]


def ranked(criteria: Criteria) -> list[str]:
    """The candidates: those that fail the fewest criteria first, then those that meet the most."""
    return sorted(
        criteria, key=lambda name: (_count(criteria[name], NOT_MET), -met(criteria[name]))
    )


def met(results: Sequence[CriterionResult]) -> int:
    """How many criteria are met."""
    return _count(results, MET, MET_WHOLE_INTERVAL)


def applicable(results: Sequence[CriterionResult]) -> int:
    """How many criteria were tested and apply."""
    return _count(results, MET, MET_WHOLE_INTERVAL, NOT_MET)


def _count(results: Sequence[CriterionResult], *outcomes: str) -> int:
    return sum(each.outcome in outcomes for each in results)


def _on_criteria(criteria: Criteria) -> str:
    order = ranked(criteria)
    best, total = order[0], len(order)
    passing = [name for name in order if met(criteria[name]) == applicable(criteria[name])]
    share = f"{met(criteria[best])} of {applicable(criteria[best])} acceptance criteria"
    if total == 1:
        return f"`{best}`, the only candidate, meets {share} that apply."
    if not passing:
        return (
            f"None of {total} candidates meets every acceptance criterion; `{best}` comes closest: "
            f"it meets {met(criteria[best])} of {applicable(criteria[best])} that apply."
        )
    verb = "fails" if len(passing) == 1 else "fail"
    return (
        f"{len(passing)} of {total} candidates ({_listed(passing)}) {verb} no acceptance "
        f"criterion; `{best}` meets {share} that apply."
    )


def _on_claims(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(each.verdict for each in verdicts if each.verdict != CLAIM_NOT_TESTED)
    total = sum(counts.values())
    parts = [
        f"{counts[name]} {'is' if counts[name] == 1 else 'are'} {name}"
        for name in _VERDICTS
        if counts[name]
    ]
    if total == 1:
        return f"The claim of this study is {next(iter(counts))}."
    if len(counts) == 1:
        return f"All {total} tested claims are {next(iter(counts))}."
    return f"Of {total} tested claims, {_joined(parts)}."


def _on_effect(variant: str, reference: str, own: Sequence[MetricComparison]) -> str:
    changed: dict[bool, list[str]] = {True: [], False: []}
    same = []
    undefined = [each.metric.label for each in own if isnan(each.comparison.change)]
    own = [each for each in own if not isnan(each.comparison.change)]
    if not own:
        return f"The changes of `{variant}` from `{reference}` are not defined."
    for each in own:
        kind = outcome(each)
        amount = f"{each.metric.label} ({_change(each.comparison.change)})"
        if kind:
            changed[kind == BETTER].append(amount)
        else:
            same.append(amount)
    parts = [
        f"significantly {word} in {_joined(changed[better])}"
        for better, word in ((True, "better"), (False, "worse"))
        if changed[better]
    ]
    n = sorted({each.comparison.n for each in own})
    counts = str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}"
    start = f"Compared with `{reference}` (n = {counts}), `{variant}` is "
    without = f"; the change in {_joined(undefined)} is not defined" if undefined else ""
    if not parts:
        return f"{start}not significantly different in {_joined(same)}{without}."
    tail = f"; the change in {_joined(same)} is not significant" if same else ""
    return f"{start}{_joined(parts)}{tail}{without}."


def _on_best(results: Results, metric: StudyMetric) -> str:
    mean = geometric_mean if metric.scale == "ratio" else fmean
    values = {name: results.values(metric, name).values() for name in results.plan.variants}
    measured = {name: [*each] for name, each in values.items() if each}
    means = {name: mean(each) for name, each in measured.items() if all(map(isfinite, each))}
    diverged = [name for name in measured if name not in means]
    without = f" {_joined([f'`{name}`' for name in diverged])} diverged." if diverged else ""
    if not means:
        return without.lstrip()
    best = (min if metric.better == "lower" else max)(means, key=means.__getitem__)
    return (
        f"The {'lowest' if metric.better == 'lower' else 'highest'} mean {metric.label} of "
        f"{len(means)} variants is {number(means[best])}, that of `{best}`.{without}"
    )


def _change(change: float) -> str:
    """A change with about two digits, as a percentage or a factor."""
    if not abs(change) < 9:
        return f"x {1 + change:.2g}"
    return f"{100 * change:+.{1 if abs(change) < 0.0995 or change < -0.985 else 0}f} %"


def _main_variants(results: Results, criteria: Criteria) -> list[str]:
    """The variants that the study is about, the most important one first."""
    return [*ranked(criteria), *results.plan.compare]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more


def _joined(parts: Sequence[str]) -> str:
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
