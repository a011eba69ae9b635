"""The files of a study's report: an HTML page, the tables in Markdown, and figures as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from oasis_attn.errors import UserError
from oasis_attn.files import check_writable, write_text
from oasis_attn.report.document import Picture, walk
from oasis_attn.report.figures import save_png
from oasis_attn.report.html import write_page
from oasis_attn.report.markdown import markdown
from oasis_attn.study.criteria import rule as criteria_rule
from oasis_attn.study.reading_guide import READING_TABLES, notes, progress_text
from oasis_attn.study.results import Results
from oasis_attn.study.storage import StudyFolder
from oasis_attn.study.study_page import study_page
from oasis_attn.study.tables import results_tables
from oasis_attn.study.verdict import Verdict, judge, rule


def write_report(folder: StudyFolder, page: str | Path) -> list[Path]:
    """Write the page, and next to it tables.md and a PNG file per figure.

    Returns:
        The paths of the files.

    Raises:
        UserError: the study has no finished trial, or `page` cannot be written.
    """
    check_writable(page, "page")
    results = finished_results(folder)
    page, parts = Path(page), study_page(results)
    tables = tables_text(results, judge(results))
    written = [write_text(page.parent / "tables.md", tables, "page")]
    for item in walk(parts.sections):
        if isinstance(item, Picture):
            written.append(save_png(item.figure, page.parent / f"{item.name}.png", "page"))
    written.append(write_page(page, parts, "page"))
    return written


def finished_results(folder: StudyFolder) -> Results:
    """The results of a study; `UserError` if it has no finished trial."""
    results = Results(folder.plan, folder.records())
    if not results.records:
        raise UserError(f"study: {str(folder.path)!r} has no finished trial")
    return results


def tables_text(results: Results, verdicts: Sequence[Verdict]) -> str:
    """All tables of the study in Markdown, with an explanation of the numbers."""
    head = [f"# Study: {results.plan.name}", results.plan.about, progress_text(results)]
    body = [markdown(table) for table in results_tables(results, verdicts)]
    rules = [rule(results.plan)] if results.plan.claims else []
    rules += [criteria_rule(results.plan)] if results.plan.candidates else []
    return "\n\n".join([*head, *rules, *READING_TABLES, *notes(results), *body]).rstrip() + "\n"
