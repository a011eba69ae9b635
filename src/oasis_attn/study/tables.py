"""The tables of a study: verdicts, tests, criteria, comparisons, means and progress."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev

from oasis_attn.report import Table, number
from oasis_attn.study.criteria import (
    MET,
    MET_WHOLE_INTERVAL,
    NOT_APPLICABLE,
    NOT_MET,
    NOT_TESTED,
    CriterionResult,
    check_criteria,
)
from oasis_attn.study.results import MetricComparison, Results
from oasis_attn.study.statistics import LEVEL, Comparison
from oasis_attn.study.storage import Status
from oasis_attn.study.verdict import (
    CLAIM_INCONCLUSIVE,
    EQUIVALENT,
    EQUIVALENT_CLAIM,
    FAILED,
    INCONCLUSIVE,
    NOT_SUPPORTED,
    OUTCOMES,
    PASSED,
    SUPPORTED,
    ClaimTestResult,
    Verdict,
)

ABSENT = "-"
_INTERVAL = f"{LEVEL:.0%} interval"
_COMPARISON_COLUMNS = (
    "n", "value", "baseline value", "change", _INTERVAL, "Hedges' g", "p (Holm)", "noise floor",
)  # fmt: skip
_EQUIVALENCE = "p (Holm) of equivalence"
_TONES = {
    **dict.fromkeys((SUPPORTED, PASSED, MET, MET_WHOLE_INTERVAL), "good"),
    **dict.fromkeys((NOT_SUPPORTED, FAILED, NOT_MET), "bad"),
    **dict.fromkeys((EQUIVALENT_CLAIM, EQUIVALENT), "neutral"),
    **dict.fromkeys((CLAIM_INCONCLUSIVE, INCONCLUSIVE, NOT_TESTED), "weak"),
}


def means_table(results: Results, corpus: str, size: str) -> Table:
    """One row per variant, one column per metric: mean ± standard deviation over seeds, and n."""
    rows = []
    for variant in results.plan.variants:
        columns = [
            [v for each, v in results.values(m, variant).items() if each[:2] == (corpus, size)]
            for m in results.metrics
        ]
        n = max(map(len, columns), default=0)
        if n:
            rows.append((variant, str(n), *map(_mean_and_deviation, columns)))
    labels = tuple(metric.label for metric in results.metrics)
    title = f"{corpus}, {size}: mean ± standard deviation over n seeds"
    return Table(title=title, columns=("variant", "n", *labels), rows=tuple(rows))


def comparison_table(results: Results, variant: str) -> Table:
    """One row per metric and baseline: change, interval, effect size, p-value and noise floor."""
    rows = tuple(
        (
            each.metric.label, each.baseline, *_statistics(each.comparison), _p(each.p_holm),
            _noise_floor(each),
        )
        for each in results.comparisons(variant)
    )  # fmt: skip
    return Table(
        title=f"{variant} compared with its baselines",
        columns=("metric", "baseline", *_COMPARISON_COLUMNS),
        rows=rows,
        text_columns=2,
        key_columns=2,
    )


def verdict_table(verdicts: Iterable[Verdict]) -> Table:
    """One row per claim: the verdict, and the number of tests with each outcome."""
    rows = tuple(
        (str(index), each.claim.text, each.verdict, _outcomes(each))
        for index, each in enumerate(verdicts, start=1)
    )
    return Table(
        title="Claims",
        columns=("no.", "claim", "verdict", "tests"),
        rows=rows,
        text_columns=4,
    )


def claim_tests_table(verdicts: Sequence[Verdict]) -> Table:
    """One row per test of each claim, with its statistics.

    The p-value of equivalence has a column if a test has a margin.
    """
    results = [result for verdict in verdicts for result in verdict.results]
    equivalence = any(result.test.margin is not None for result in results)
    rows = []
    for index, verdict in enumerate(verdicts, start=1):
        for letter, each in enumerate(verdict.results):
            name = f"{index}{_letter(letter)}" if len(verdict.results) > 1 else str(index)
            row = (name, each.test.text.replace("`", ""), each.outcome, *_test_statistics(each))
            rows.append((*row, *[_p(each.p_equivalence_holm)] * equivalence))
    return Table(
        title="Tests of the claims",
        columns=("no.", "test", "outcome", *_COMPARISON_COLUMNS, *[_EQUIVALENCE] * equivalence),
        rows=tuple(rows),
        text_columns=3,
    )


def criteria_table(results: Results) -> Table:
    """One row per candidate of the plan and criterion."""
    rows = tuple(
        (
            variant, each.text, each.outcome, str(each.n), _amount(each, each.change),
            _criterion_interval(each), _amount(each, each.limit),
        )
        for variant in results.plan.candidates
        for each in check_criteria(results, variant)
    )  # fmt: skip
    return Table(
        title="Acceptance criteria",
        columns=("variant", "criterion", "outcome", "n", "change", _INTERVAL, "limit"),
        rows=rows,
        text_columns=3,
        key_columns=2,
    )


def criteria_summary(results: Results) -> Table:
    """One row per candidate with records, one column per criterion."""
    rows, columns = [], ["variant"]
    for variant in results.plan.candidates:
        criteria = check_criteria(results, variant)
        limits = (f"{each.text} (limit {_amount(each, each.limit)})" for each in criteria)
        columns = ["variant", *limits]
        if any(each.n for each in criteria):
            rows.append((variant, *map(_change_and_outcome, criteria)))
    return Table(columns=tuple(columns), rows=tuple(rows), text_columns=len(columns))


def status_table(status: Status, name: str) -> Table:
    """The progress of a study: counts, remaining time with one worker, and failures."""
    left = status.left
    rows = [
        ("trials", str(status.total)),
        ("done", str(len(status.done))),
        ("running", str(len(status.running))),
        ("failed", str(len(status.failed))),
    ]
    if status.seconds_per_trial is not None:
        rows.append(("seconds per trial, without its start", number(status.seconds_per_trial)))
    if status.seconds_per_trial is not None and left:
        rows.append(("hours left, one worker", number(status.seconds_per_trial * left / 3600)))
    rows += [(trial, reason) for trial, reason in status.failed.items()]
    return Table(title=name, columns=("", ""), rows=tuple(rows), text_columns=2)


def results_tables(results: Results, verdicts: Sequence[Verdict]) -> list[Table]:
    """All tables of a study, the verdicts first."""
    finished = {trial.condition[:2] for trial in results.records}
    groups = [(c, s) for c in results.plan.corpora for s in results.plan.sizes]
    return [
        *([verdict_table(verdicts), claim_tests_table(verdicts)] if verdicts else []),
        *([criteria_table(results)] if results.plan.candidates else []),
        *(comparison_table(results, variant) for variant in results.plan.compare),
        *(means_table(results, *group) for group in groups if group in finished),
    ]


def percent(value: float) -> str:
    """A fraction as a signed percentage with two decimals; a dash if it is NaN."""
    if math.isnan(value):
        return ABSENT
    return f"{value:+.2%}" if abs(value) < 1e3 else f"{value:+.2g} x"


def tone(cell: str) -> str:
    """The tone of a cell that is, or ends with, an outcome or verdict; empty for other cells."""
    outcome = cell.rpartition(", ")[2]
    return "weak" if cell.startswith(NOT_APPLICABLE) else _TONES.get(outcome, "")


def _outcomes(verdict: Verdict) -> str:
    counts = Counter(result.outcome for result in verdict.results)
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])


def _mean_and_deviation(values: list[float]) -> str:
    if not values:
        return ABSENT
    if len(values) == 1:
        return number(values[0])
    deviation = stdev(values) if all(map(math.isfinite, values)) else math.nan
    return f"{number(fmean(values))} ± {number(deviation)}"


def _letter(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else f".{index + 1}"


def _test_statistics(result: ClaimTestResult) -> tuple[str, ...]:
    comparison, slope = result.comparison, result.test.kind == "slope"
    floor = percent(result.noise_floor).removeprefix("+")
    shown = ("0", *[ABSENT] * 5)
    if comparison is not None:
        shown = _statistics(comparison, _signed if slope else percent)
    return (*shown, _p(result.p_holm), floor)


def _statistics(
    comparison: Comparison, amount: Callable[[float], str] | None = None
) -> tuple[str, ...]:
    effect, amount = comparison.effect_size, amount or percent
    return (
        str(comparison.n),
        number(comparison.mean),
        number(comparison.baseline_mean),
        amount(comparison.change),
        _interval(comparison.low, comparison.high, amount),
        ABSENT if math.isnan(effect) else number(effect),
    )


def _interval(low: float, high: float, amount: Callable[[float], str]) -> str:
    return ABSENT if math.isnan(low) else f"{amount(low)} to {amount(high)}"


def _signed(value: float) -> str:
    if math.isnan(value):
        return ABSENT
    return ("+" if value >= 0 else "") + number(value)


def _amount(criterion: CriterionResult, value: float) -> str:
    """A relative change, or the value itself for a fixed limit."""
    if criterion.fixed:
        return ABSENT if math.isnan(value) else number(value)
    return percent(value)


def _criterion_interval(criterion: CriterionResult) -> str:
    return _interval(criterion.low, criterion.high, lambda value: _amount(criterion, value))


def _change_and_outcome(criterion: CriterionResult) -> str:
    if not criterion.n or criterion.outcome.startswith(NOT_APPLICABLE):
        return criterion.outcome
    finite = math.isfinite(criterion.change)
    change = _amount(criterion, criterion.change) if finite else "above a baseline of 0"
    return f"{change}, {criterion.outcome}"


def _p(value: float) -> str:
    if math.isnan(value):
        return ABSENT
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _noise_floor(each: MetricComparison) -> str:
    if math.isnan(each.noise_floor):
        return ABSENT
    return f"{each.noise_floor:.2%} (n {each.noise_pairs})"
