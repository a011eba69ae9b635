"""The page of a study: the answer first, then verdicts, key figures, and all numbers in folds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from oasis_attn.report.changes import BETTER, READING, WORSE
from oasis_attn.report.document import Badges, Fold, Gallery, Item, Page, Section
from oasis_attn.report.tables import Table
from oasis_attn.study.answers import Criteria, answers, applicable, met, ranked
from oasis_attn.study.criteria import check_criteria
from oasis_attn.study.criteria import rule as criteria_rule
from oasis_attn.study.key_figures import change_picture, key_comparisons, key_pictures, outcome
from oasis_attn.study.reading_guide import READING_TABLES, notes, progress_text
from oasis_attn.study.results import Results
from oasis_attn.study.tables import (
    claim_tests_table,
    comparison_table,
    criteria_summary,
    criteria_table,
    means_table,
    tone,
    verdict_table,
)
from oasis_attn.study.verdict import CLAIM_NOT_TESTED, NOT_TESTED, Verdict, judge, rule


def study_page(results: Results) -> Page:
    """The page of a study that has at least one record."""
    plan, verdicts = results.plan, judge(results)
    checked = {name: check_criteria(results, name) for name in plan.candidates}
    criteria = {name: found for name, found in checked.items() if any(each.n for each in found)}
    comparisons = key_comparisons(results)
    sections = []
    if criteria:
        sections.append(Section("Acceptance criteria", _criteria(results, criteria)))
    tested = [each for each in verdicts if each.verdict != CLAIM_NOT_TESTED]
    if tested:
        sections.append(Section("Verdicts on the claims", _claims(results, verdicts)))
    if comparisons:
        reading = (
            f"{READING} p-values are corrected for all changes of these figures (Holm). The "
            f"reference is `{plan.reference}`."
        )
        pictures = Gallery(tuple(key_pictures(results, comparisons)))
        sections.append(Section("Key figures", [pictures, reading]))
    compared = [fold for name in plan.compare if (fold := _variant(results, name))]
    if compared:
        sections.append(Section("Variants and their baselines", compared))
    groups = dict.fromkeys(trial.condition[:2] for trial in results.records)
    means = [
        Fold(
            f"{corpus}, {size}: all metrics of all variants", (means_table(results, corpus, size),)
        )
        for corpus, size in groups
    ]
    sections.append(Section("All means", means))
    sections.append(Section("How to read the numbers", [*READING_TABLES, *notes(results)]))
    counts = Counter(each.verdict for each in tested)
    badges = Badges(tuple((f"{n} {name}", tone(name)) for name, n in counts.most_common()))
    said = answers(results, verdicts, criteria, comparisons)
    record = next(iter(results.records.values()))
    versions = ", ".join(f"{name} {v}" for name, v in record.environment.versions.items())
    return Page(
        title=f"Study: {plan.name}",
        lead=f"{plan.about} {progress_text(results)}",
        footer=f"{record.created} · {record.environment.device} · {versions}",
        answers=(*said, *([badges] if badges.items else [])),
        sections=tuple(sections),
    )


def _criteria(results: Results, criteria: Criteria) -> list[Item]:
    """The candidates that meet most criteria first, then each criterion with its numbers."""
    summary = criteria_summary(results)
    rows = {row[0]: row[1:] for row in summary.rows}
    matrix = Table(
        title="Candidates and criteria: change and outcome",
        columns=("variant", "met", *summary.columns[1:]),
        rows=tuple(
            (name, f"{met(criteria[name])} of {applicable(criteria[name])}", *rows[name])
            for name in ranked(criteria)
        ),
        text_columns=len(summary.columns) + 1,
        tone=tone,
    )
    details = replace(criteria_table(results), tone=tone)
    return [
        matrix,
        Fold("Every criterion with n, interval and limit", (details,)),
        Fold("How criteria are judged", (criteria_rule(results.plan),)),
    ]


def _claims(results: Results, verdicts: Sequence[Verdict]) -> list[Item]:
    claims = _without(verdict_table(verdicts), 2, CLAIM_NOT_TESTED)
    tests = _without(claim_tests_table(verdicts), 2, NOT_TESTED)
    hidden = sum(each.verdict == CLAIM_NOT_TESTED for each in verdicts)
    untested = "One claim is" if hidden == 1 else f"{hidden} claims are"
    note = [f"{untested} not shown, because this study lacks the data for a test."] * bool(hidden)
    return [
        claims,
        *note,
        Fold("Every test with its statistics", (tests,)),
        Fold("How claims are judged", (rule(results.plan),)),
    ]


def _without(table: Table, column: int, value: str) -> Table:
    """The table without the rows that have a value in a column, and with badges."""
    return replace(table, rows=tuple(row for row in table.rows if row[column] != value), tone=tone)


def _variant(results: Results, variant: str) -> Fold | None:
    """The comparison of one variant with its baselines; None without a pair."""
    comparisons = results.comparisons(variant)
    if not comparisons:
        return None
    counts = Counter(outcome(each) for each in comparisons)
    baselines = results.plan.compare[variant]
    of = f"{len(baselines)} baselines" if len(baselines) > 1 else baselines[0]
    summary = (
        f"{variant} against {of}: {counts[BETTER]} changes are significantly better, "
        f"{counts[WORSE]} worse, {counts['']} not significant"
    )
    picture = change_picture(results, variant)
    return Fold(summary, (*([picture] if picture else []), comparison_table(results, variant)))
