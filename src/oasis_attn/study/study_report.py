"""The report of a study: an HTML page, the tables in Markdown, and figures as PNG files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from oasis_attn.errors import UserError
from oasis_attn.files import check_writable, write_text
from oasis_attn.report.changes import Change, change_figure
from oasis_attn.report.figures import save_png
from oasis_attn.report.html import Block, figure_block, paragraph, table_block, write_page
from oasis_attn.report.markdown import markdown
from oasis_attn.study.criteria import RULE as CRITERIA_RULE
from oasis_attn.study.results import Results
from oasis_attn.study.statistics import LEVEL
from oasis_attn.study.storage import StudyFolder
from oasis_attn.study.tables import (
    claim_tests_table,
    comparison_table,
    criteria_table,
    means_table,
    results_tables,
    verdict_table,
)
from oasis_attn.study.verdict import RULE, Verdict, judge

_PAIRS = (
    "A condition is one corpus, size and seed. Two variants are compared pair by pair in the same "
    "conditions; n is the number of pairs. For metrics that vary in proportion (perplexity, norms, "
    "kurtosis) the change is that of the geometric mean. For fractions, masses and "
    "log-likelihoods it is that of the arithmetic mean."
)
_INTERVALS = (
    f"Intervals are {LEVEL:.0%} bootstrap intervals (BCa) that resample conditions. They are too "
    "narrow if there are few conditions. p-values are from paired t-tests, with Holm's correction "
    "for all rows of their table. Hedges' g is the mean of the paired differences divided by their "
    "standard deviation, with a correction for small samples. Conditions with the same corpus are "
    "not independent samples of all text: the results hold for the corpora in the table."
)
_NOISE_FLOOR = (
    "The noise floor is the change that a different seed alone causes: the root mean square of the "
    "change between any two runs of the reference that differ only in their seed."
)
READING = (_PAIRS, _INTERVALS, _NOISE_FLOOR)
"""How to read the numbers of the tables."""


def write_report(folder: StudyFolder, page: str | Path) -> list[Path]:
    """Write the page, and next to it tables.md and a PNG file per compared variant.

    Returns:
        The paths of the files.

    Raises:
        UserError: the study has no finished trial, or `page` cannot be written.
    """
    check_writable(page, "page")
    results = Results(folder.plan, folder.records())
    if not results.records:
        raise UserError(f"study: {str(folder.path)!r} has no finished trial")
    page, verdicts = Path(page), judge(results)
    figures = {
        variant: change_figure(drawn, title=variant)
        for variant in folder.plan.compare
        if (drawn := changes(results, variant))
    }
    written = [write_text(page.parent / "tables.md", tables_text(results, verdicts))]
    for variant, figure in figures.items():
        written.append(save_png(figure, page.parent / f"changes-{variant}.png"))
    sections: list[tuple[str, Sequence[Block]]] = [
        ("Verdicts", _verdicts(results, verdicts)),
        ("How to read the numbers", [paragraph(text) for text in (*READING, *notes(results))]),
    ]
    if folder.plan.candidates:
        criteria = [paragraph(CRITERIA_RULE), table_block(criteria_table(results))]
        sections.append(("Acceptance criteria", criteria))
    for variant in folder.plan.compare:
        blocks = [table_block(comparison_table(results, variant))]
        if variant in figures:
            caption = (
                "Each dot is a change, its line is the interval, and the gray band is the noise "
                "floor. Changes that are not finite are not shown."
            )
            blocks.insert(0, figure_block(figures[variant], caption))
        sections.append((f"{variant} compared with its baselines", blocks))
    groups = dict.fromkeys(trial.condition[:2] for trial in results.records)
    means = [table_block(means_table(results, *group)) for group in groups]
    sections.append(("All variants", means))
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
    """All tables of the study in Markdown, with an explanation of the numbers."""
    head = [f"# Study: {results.plan.name}", results.plan.about, progress_text(results)]
    body = [markdown(table) for table in results_tables(results, verdicts)]
    rules = [RULE, *([CRITERIA_RULE] if results.plan.candidates else [])]
    return "\n\n".join([*head, *rules, *READING, *notes(results), *body]).rstrip() + "\n"


def progress_text(results: Results) -> str:
    """How many trials of the plan are finished, and the size of its grid."""
    plan, done = results.plan, len(results.records)
    extra = ""
    if plan.noise_seeds:
        extra = f", and {_count(plan.noise_seeds, 'additional seed')} of {plan.reference}"
    return (
        f"{done} of {len(plan.trials)} trials: {_count(plan.variants, 'variant')} x "
        f"{_count(plan.corpora, 'corpus', 'corpora')} x {_count(plan.sizes, 'size')} x "
        f"{_count(plan.seeds, 'seed')}{extra}."
    )


def _count(items: Collection[object], singular: str, plural: str = "") -> str:
    n = len(items)
    return f"{n} {singular if n == 1 else plural or singular + 's'}"


def notes(results: Results) -> list[str]:
    """Warnings that apply to the variants of this study."""
    forms: dict[str, list[str]] = {}
    for trial, record in results.records.items():
        variants = forms.setdefault((record.model.config or {})["residual"], [])
        if trial.variant not in variants:
            variants.append(trial.variant)
    found = []
    if len(forms) > 1:
        named = "; ".join(f"{form}: {', '.join(variants)}" for form, variants in forms.items())
        found.append(
            "Compare max inf-norms only between variants with the same residual form. A residual "
            "sum grows with depth by construction, but a weighted mean of sources does not, and "
            "the following norm removes the scale of both. The residual forms of this study are: "
            f"{named}. Kurtosis does not depend on scale."
        )
    configs = [record.model.config or {} for record in results.records.values()]
    if any(each["residual"] != "sum" and each["depth_normalizer"] == "sigmoid" for each in configs):
        found.append(
            "The depth sink rate counts weights above a threshold. Sigmoid weights do not sum to "
            "1, and each of them may be close to 1. Their depth sink rate cannot be compared with "
            "that of the other normalizers."
        )
    return found


def changes(results: Results, variant: str) -> list[Change]:
    """The data of the figure that compares one variant with its baselines."""
    return [
        Change(
            panel=each.metric.label,
            label=each.baseline,
            change=each.comparison.change,
            low=each.comparison.low,
            high=each.comparison.high,
            noise_floor=each.noise_floor,
        )
        for each in results.comparisons(variant)
        if abs(each.comparison.change) < float("inf")
    ]


def _verdicts(results: Results, verdicts: Sequence[Verdict]) -> list[Block]:
    counts = Counter(each.verdict for each in verdicts)
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return [
        paragraph(f"{progress_text(results)} Of {len(verdicts)} claims: {summary}."),
        table_block(verdict_table(verdicts)),
        paragraph(RULE),
        table_block(claim_tests_table(verdicts)),
    ]
