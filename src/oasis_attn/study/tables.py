"""A study's tables, made from its results: means, comparisons, verdict, cells."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from oasis_attn.report import Table, number
from oasis_attn.study.bar import Hurdle, bar
from oasis_attn.study.folder import Status
from oasis_attn.study.results import Compared, Results
from oasis_attn.study.statistics import LEVEL, Comparison
from oasis_attn.study.verdict import Verdict

ABSENT = "-"


def means_table(results: Results, corpus: str, size: str) -> Table:
    """A row per variant, a column per measure: mean ± standard deviation over seeds, and n."""
    rows = []
    for row in results.plan.variants:
        columns = [
            [v for unit, v in results.values(m, row).items() if unit[:2] == (corpus, size)]
            for m in results.measures
        ]
        n = max(map(len, columns), default=0)
        if n:
            rows.append((row, str(n), *map(_spread, columns)))
    heads = tuple(measure.head for measure in results.measures)
    title = f"{corpus}, {size}: mean ± standard deviation over n seeds"
    return Table(title=title, columns=("variant", "n", *heads), rows=tuple(rows))


def comparison_table(results: Results, subject: str) -> Table:
    """A row per measure and baseline: the change with its interval, effect size, p and floor."""
    rows = tuple(
        (each.measure.head, each.against, *_numbers(each.numbers), _p(each.p), _floor(each))
        for each in results.comparisons(subject)
    )
    return Table(
        title=f"{subject} against others, pair by pair",
        columns=(
            "measure", "against", "n", subject, "baseline", "change", f"{LEVEL:.0%} interval",
            "Hedges' g", "p (Holm)", "noise floor",
        ),
        rows=rows,
        words=2,
    )  # fmt: skip


def verdict_table(verdicts: Iterable[Verdict]) -> Table:
    """A row per claim: what the rule says of it."""
    rows = tuple(
        (str(index), judged.claim.text, judged.verdict, *_counts(judged))
        for index, judged in enumerate(verdicts, start=1)
    )
    return Table(
        title="The paper's claims",
        columns=("", "claim", "verdict", "tests won", "lost", "open", "untested"),
        rows=rows,
        words=3,
    )


def predictions_table(verdicts: Iterable[Verdict]) -> Table:
    """A row per test of each claim, with its numbers."""
    rows = []
    for index, judged in enumerate(verdicts, start=1):
        for found in judged.findings:
            seen = found.numbers
            numbers = ("0", *[ABSENT] * 5) if seen is None else _numbers(seen)
            floor = percent(found.floor).removeprefix("+")
            words = found.test.words.replace("`", "")
            rows.append((str(index), words, found.outcome, *numbers, _p(found.p), floor))
    return Table(
        title="Their tests",
        columns=(
            "claim", "test", "outcome", "n", "subject", "baseline", "change",
            f"{LEVEL:.0%} interval", "Hedges' g", "p (Holm)", "noise floor",
        ),
        rows=tuple(rows),
        words=3,
    )  # fmt: skip


def bar_table(results: Results) -> Table:
    """A row per hurdle of each row that the plan holds against the bar."""
    rows = tuple(
        (each.row, each.text, each.outcome, str(each.n), *_hurdle(each))
        for row in results.plan.bar
        for each in bar(results, row)
    )
    columns = ("variant", "hurdle", "outcome", "n", "change", f"{LEVEL:.0%} interval", "at most")
    return Table(title="The bar", columns=columns, rows=rows, words=3)


def bar_summary(results: Results) -> Table:
    """A row per variant that is held against the bar and measured, a column per hurdle."""
    rows, columns = [], ["variant"]
    for row in results.plan.bar:
        hurdles = bar(results, row)
        columns = ["variant", *(f"{each.text} (at most {percent(each.limit)})" for each in hurdles)]
        if any(each.n for each in hurdles):
            rows.append((row, *map(_cleared, hurdles)))
    return Table(title="", columns=tuple(columns), rows=tuple(rows), words=len(columns))


def status_table(status: Status, name: str) -> Table:
    """Where a study stands: counts, time left of one worker, and what failed why."""
    left = status.left
    rows = [
        ("cells", str(status.total)),
        ("done", str(len(status.done))),
        ("running", str(len(status.running))),
        ("failed", str(len(status.failed))),
    ]
    if status.seconds_per_cell is not None:
        rows.append(("seconds per cell", number(status.seconds_per_cell)))
    if status.seconds_per_cell is not None and left:
        rows.append(("hours left, one worker", number(status.seconds_per_cell * left / 3600)))
    rows += [(cell, reason) for cell, reason in status.failed.items()]
    return Table(title=name, columns=("", ""), rows=tuple(rows), words=2)


def results_tables(results: Results, verdicts: Sequence[Verdict]) -> list[Table]:
    """All tables of a study, the verdict first."""
    finished = {cell.unit[:2] for cell in results.records}
    groups = [(c, s) for c in results.plan.corpora for s in results.plan.sizes]
    return [
        verdict_table(verdicts),
        predictions_table(verdicts),
        *([bar_table(results)] if results.plan.bar else []),
        *(comparison_table(results, subject) for subject in results.plan.compare),
        *(means_table(results, *group) for group in groups if group in finished),
    ]


def percent(value: float) -> str:
    """A share as a percentage with two decimals, signed; a dash where it is not a number."""
    if math.isnan(value):
        return ABSENT
    return f"{value:+.2%}" if abs(value) < 1e3 else f"{value:+.2g} x"


def _counts(judged: Verdict) -> tuple[str, ...]:
    outcomes = Counter(found.outcome for found in judged.findings)
    return tuple(str(outcomes[name]) for name in ("won", "lost", "open", "untested"))


def _spread(values: list[float]) -> str:
    if not values:
        return ABSENT
    if len(values) == 1:
        return number(values[0])
    spread = stdev(values) if all(map(math.isfinite, values)) else math.nan
    return f"{number(fmean(values))} ± {number(spread)}"


def _numbers(seen: Comparison) -> tuple[str, ...]:
    interval = ABSENT
    if not math.isnan(seen.low):
        interval = f"{percent(seen.low)} to {percent(seen.high)}"
    return (
        str(seen.n),
        number(seen.subject),
        number(seen.baseline),
        percent(seen.change),
        interval,
        ABSENT if math.isnan(seen.effect_size) else number(seen.effect_size),
    )


def _hurdle(each: Hurdle) -> tuple[str, str, str]:
    interval = ABSENT
    if not math.isnan(each.low):
        interval = f"{percent(each.low)} to {percent(each.high)}"
    return percent(each.change), interval, percent(each.limit)


def _cleared(each: Hurdle) -> str:
    if not each.n:
        return ""
    change = percent(each.change) if math.isfinite(each.change) else "above its 0"
    return f"{change}, {each.outcome}"


def _p(value: float) -> str:
    if math.isnan(value):
        return ABSENT
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _floor(each: Compared) -> str:
    if math.isnan(each.floor):
        return ABSENT
    return f"{each.floor:.2%} (n {each.floor_n})"
