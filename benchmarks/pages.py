"""Pages of the docs whose tables are generated from the committed results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from oasis_attn.errors import UserError
from oasis_attn.report.tables import number
from oasis_attn.study.results import Results
from oasis_attn.study.storage import StudyFolder

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results"


def published(names: Iterable[str]) -> dict[str, Results]:
    """The results of those of the studies that are under docs/results, by name."""
    places = {name: RESULTS / name for name in names}
    folders = {name: StudyFolder.open(place) for name, place in places.items() if place.is_dir()}
    return {name: Results(folder.plan, folder.records()) for name, folder in folders.items()}


def fill(page: Path, text: str, script: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The text of a page with every table generated again.

    Each table is between the lines `<!-- benchmarks/SCRIPT: NAME -->` and `<!-- end -->`, with the
    name of the table.
    """
    for name, generate in tables.items():
        begin, end = f"<!-- benchmarks/{script}: {name} -->\n", "<!-- end -->\n"
        head, mark, rest = text.partition(begin)
        if not mark:
            raise UserError(f"{page.name}: {begin.strip()!r} is missing")
        text = head + begin + generate() + end + rest.partition(end)[2]
    return text


def short(value: float) -> str:
    """A number with three significant digits."""
    return number(float(f"{value:.3g}"))


def value_range(values: Sequence[float], *, mean: bool = False) -> str:
    """The smallest and the largest of `values`, with `mean` behind their mean."""
    low, high = short(min(values)), short(max(values))
    text = low if low == high else f"{low} to {high}"
    return f"{short(fmean(values))} [{text}]" if mean else text
