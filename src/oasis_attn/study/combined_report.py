"""One page of any records and studies, and files of their figures and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oasis_attn.errors import UserError, shown
from oasis_attn.files import check_writable
from oasis_attn.records import Record
from oasis_attn.report.document import Item, Page, Section
from oasis_attn.report.export import save_figures, save_tables
from oasis_attn.report.html import write_page
from oasis_attn.report.record_page import answers, footer, named, record_sections, title
from oasis_attn.study.lookup import PLAN_FILE
from oasis_attn.study.storage import StudyFolder
from oasis_attn.study.study_page import study_page
from oasis_attn.study.study_report import finished_results

_RECORD_FILE = "record.json"  # in the folder of a trained or quantized model


@dataclass(frozen=True)
class Inputs:
    """What a report is about.

    Attributes:
        records: path (and line, in a .jsonl file) -> record.
        studies: the folders of studies.
    """

    records: dict[str, Record]
    studies: tuple[StudyFolder, ...]


def read_inputs(paths: Sequence[str | Path]) -> Inputs:
    """Read records and open studies.

    Args:
        paths: files of records (.json, or .jsonl with one record per line), folders with a
            record.json, or folders of studies.

    Raises:
        UserError: one of them cannot be read; the message names it.
    """
    records: dict[str, Record] = {}
    studies = []
    for path in map(Path, dict.fromkeys(map(str, paths))):
        if (path / PLAN_FILE).is_file():
            studies.append(StudyFolder.open(path))
        elif path.suffix == ".jsonl" and path.is_file():
            records |= _lines(path)
        elif path.is_dir() and not (path / _RECORD_FILE).is_file():
            raise UserError(
                f"record: {shown(str(path))} is a folder with neither {_RECORD_FILE} nor "
                f"{PLAN_FILE}, the plan of a study"
            )
        else:
            records[str(path)] = Record.load(path / _RECORD_FILE if path.is_dir() else path)
    return Inputs(records, tuple(studies))


def write_combined_report(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    figures: str | Path | None = None,
    tables: str | Path | None = None,
) -> list[Path]:
    """Write one page about records and studies; nothing is written if one cannot be read.

    Args:
        paths: see `read_inputs`.
        out: path of the page.
        figures: folder for a PNG and an SVG file of every figure.
        tables: folder for a CSV and a LaTeX file of every table.

    Returns:
        The paths of the files.

    Raises:
        UserError: a record or study cannot be read or is malformed, or a file cannot be written.
    """
    check_writable(out, "out")
    for folder, name in ((figures, "figures"), (tables, "tables")):
        if folder is not None:
            check_writable(Path(folder) / "any", name)
    page = combined_page(read_inputs(paths))
    written = [write_page(out, page)]
    written += save_figures(page.sections, figures) if figures is not None else []
    written += save_tables(page.sections, tables) if tables is not None else []
    return written


def combined_page(inputs: Inputs) -> Page:
    """The parts of the page: those of each study, and those of all records together."""
    pages = [study_page(finished_results(folder)) for folder in inputs.studies]
    if len(pages) == 1 and not inputs.records:
        return pages[0]
    said: list[Item] = []
    sections: list[Section] = []
    for page in pages:
        said += [
            f"{page.title}. {item}" if isinstance(item, str) else item for item in page.answers
        ]
        sections += [Section(f"{page.title}: {each.heading}", each.items) for each in page.sections]
    headings, footers = [page.title for page in pages], [page.footer for page in pages]
    if inputs.records:
        records = named(inputs.records)
        labeled = dict(zip(records, inputs.records, strict=True))
        said = [*answers(records, labeled), *said]
        sections = [*record_sections(records, labeled), *sections]
        headings = [title(records), *headings]
        footers = [footer(records), *footers]
    read = ", ".join([*inputs.records, *(str(folder.path) for folder in inputs.studies)])
    return Page(
        title=headings[0] if len(headings) == 1 else "; ".join(headings),
        lead=f"From {read}.",
        answers=tuple(said),
        sections=tuple(sections),
        footer=" · ".join(footers),
    )


def _lines(path: Path) -> dict[str, Record]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"record: {shown(str(path))} is not a readable file of records ({error})"
        ) from error
    found = {
        f"{path}:{number}": Record.from_json(line, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    }
    if not found:
        raise UserError(f"record: {shown(str(path))} contains no record")
    return found
