"""A study's report: one page, the tables in Markdown, the figures as PNG; all from records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from oasis_attn.errors import UserError
from oasis_attn.files import check_writable, write_text
from oasis_attn.report.changes import Change, change_figure
from oasis_attn.report.figures import save_png
from oasis_attn.report.html import Block, figure_block, paragraph, table_block, write_page
from oasis_attn.report.markdown import markdown
from oasis_attn.study.bar import RULE as BAR
from oasis_attn.study.folder import StudyFolder
from oasis_attn.study.results import Results
from oasis_attn.study.statistics import LEVEL
from oasis_attn.study.tables import (
    bar_table,
    comparison_table,
    means_table,
    predictions_table,
    results_tables,
    verdict_table,
)
from oasis_attn.study.verdict import RULE, Verdict, judge

_UNITS = (
    "A unit is one corpus, size and seed; models are compared in the same units, pair by pair, and "
    "n counts the pairs. The change of measures that vary in proportion (perplexity, norms, "
    "kurtosis) is that of the geometric mean; of shares, masses and likelihoods, that of the mean."
)
_INTERVALS = (
    f"Intervals are {LEVEL:.0%} bootstrap intervals (BCa) that draw whole units; from few units "
    "they are too narrow. p-values are of paired t-tests, corrected by Holm for every line of "
    "their table. Hedges' g is the mean of the paired differences over their standard deviation, "
    "corrected for few units. Units of one corpus are not independent samples of all text: what is "
    "said holds for the corpora named."
)
_NOISE = (
    "The noise floor is what a change of seed alone makes: the root mean square of the change "
    "between any two runs of the reference that differ in their seed."
)
READING = (_UNITS, _INTERVALS, _NOISE)


def write_report(folder: StudyFolder, page: str | Path) -> list[Path]:
    """Write `page`, and beside it tables.md and a PNG per comparison.

    Returns:
        The files written.

    Raises:
        UserError: the study has no finished cell; `page` cannot be written.
    """
    check_writable(page, "page")
    results = Results(folder.plan, folder.records())
    if not results.records:
        raise UserError(f"study: {str(folder.path)!r} has no finished cell to report on")
    page, verdicts = Path(page), judge(results)
    figures = {
        subject: change_figure(drawn, title=subject)
        for subject in folder.plan.compare
        if (drawn := changes(results, subject))
    }
    written = [write_text(page.parent / "tables.md", tables_text(results, verdicts))]
    for subject, figure in figures.items():
        written.append(save_png(figure, page.parent / f"changes-{subject}.png"))
    sections: list[tuple[str, Sequence[Block]]] = [
        ("The verdict", _verdict(results, verdicts)),
        ("How to read the numbers", [paragraph(text) for text in (*READING, *notes(results))]),
    ]
    if folder.plan.bar:
        sections.append(("The bar", [paragraph(BAR), table_block(bar_table(results))]))
    for subject in folder.plan.compare:
        blocks = [table_block(comparison_table(results, subject))]
        if subject in figures:
            caption = (
                "A dot is the change, its line the interval, the grey band the noise floor. "
                "Changes that are not finite are left out."
            )
            blocks.insert(0, figure_block(figures[subject], caption))
        sections.append((f"{subject} against others", blocks))
    groups = dict.fromkeys(cell.unit[:2] for cell in results.records)
    means = [table_block(means_table(results, *group)) for group in groups]
    sections.append(("Every variant", means))
    record = next(iter(results.records.values()))
    environment = record.environment
    versions = ", ".join(f"{name} {v}" for name, v in environment.versions.items())
    written.append(
        write_page(
            page,
            title=f"Study: {folder.plan.name}",
            lead=folder.plan.about,
            sections=sections,
            footer=f"{record.created} · {environment.device} · {versions}",
        )
    )
    return written


def tables_text(results: Results, verdicts: Sequence[Verdict]) -> str:
    """Every table of the study, with how to read it, in Markdown."""
    head = [f"# Study: {results.plan.name}", results.plan.about, standing(results)]
    body = [markdown(table) for table in results_tables(results, verdicts)]
    rules = [RULE, *([BAR] if results.plan.bar else [])]
    return "\n\n".join([*head, *rules, *READING, *notes(results), *body]).rstrip() + "\n"


def standing(results: Results) -> str:
    """How much of the plan the numbers are from."""
    plan, done = results.plan, len(results.records)
    return (
        f"{done} of {len(plan.cells)} cells: {len(plan.variants)} variants x "
        f"{len(plan.corpora)} corpora x {len(plan.sizes)} sizes x {len(plan.seeds)} seeds, and "
        f"{len(plan.noise_seeds)} more seeds of {plan.reference}."
    )


def notes(results: Results) -> list[str]:
    """What must be known of the numbers of just these variants."""
    kinds: dict[str, list[str]] = {}
    for cell, record in results.records.items():
        kind = (record.model.config or {})["residual"]
        if cell.row not in kinds.setdefault(kind, []):
            kinds[kind].append(cell.row)
    found = []
    if len(kinds) > 1:
        named = "; ".join(f"{kind}: {', '.join(rows)}" for kind, rows in kinds.items())
        found.append(
            "Max inf-norms compare within one residual form only: a residual sum grows with depth "
            "by construction, a weighted mean of sources does not, and neither scale means "
            f"anything to the next norm. Residual forms here: {named}. Kurtosis has no scale."
        )
    settings = [record.model.config or {} for record in results.records.values()]
    if any(
        each["residual"] != "sum" and each["depth_normalizer"] == "sigmoid" for each in settings
    ):
        found.append(
            "The depth sink rate counts weights above its threshold. Sigmoid weights are no "
            "shares, each may be near 1, so that theirs does not compare with that of the others."
        )
    return found


def changes(results: Results, subject: str) -> list[Change]:
    """The lines of the figure of one row against those it is compared with."""
    return [
        Change(
            panel=each.measure.head,
            label=each.against,
            change=each.numbers.change,
            low=each.numbers.low,
            high=each.numbers.high,
            floor=each.floor,
        )
        for each in results.comparisons(subject)
        if abs(each.numbers.change) < float("inf")
    ]


def _verdict(results: Results, verdicts: Sequence[Verdict]) -> list[Block]:
    counts: dict[str, int] = {}
    for judged in verdicts:
        counts[judged.verdict] = counts.get(judged.verdict, 0) + 1
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return [
        paragraph(f"{standing(results)} Of {len(verdicts)} claims: {summary}."),
        table_block(verdict_table(verdicts)),
        paragraph(RULE),
        table_block(predictions_table(verdicts)),
    ]
