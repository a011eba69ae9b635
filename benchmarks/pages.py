"""Pages of the docs whose tables are generated from the committed results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from oasis_attn.errors import UserError
from oasis_attn.study.results import Results
from oasis_attn.study.storage import StudyFolder

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results"


def published(names: Iterable[str]) -> dict[str, Results]:
    """The results of those of the studies that are under docs/results, by name."""
    places = {name: RESULTS / name for name in names}
    folders = {name: StudyFolder.open(place) for name, place in places.items() if place.is_dir()}
    return {name: Results(folder.plan, folder.records()) for name, folder in folders.items()}


def fill(page: Path, text: str, script: str, generators: Iterable[Callable[[], str]]) -> str:
    """The text of a page with every table generated again.

    Each table is between the lines `<!-- benchmarks/SCRIPT: NAME -->` and `<!-- end -->`, with the
    name of its generator.
    """
    for generate in generators:
        begin, end = f"<!-- benchmarks/{script}: {generate.__name__} -->\n", "<!-- end -->\n"
        head, mark, rest = text.partition(begin)
        if not mark:
            raise UserError(f"{page.name}: {begin.strip()!r} is missing")
        text = head + begin + generate() + end + rest.partition(end)[2]
    return text
