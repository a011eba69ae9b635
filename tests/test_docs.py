"""No figure in the docs is typed: tables are those their records give."""

from pathlib import Path

import healing
from oasis_attn.records import Record

DOCS = Path(__file__).parents[1] / "docs"


def test_healing() -> None:
    folder = DOCS / "results" / "healing"
    table = healing.table(Record.load(folder / "record.json"))
    assert (folder / "table.md").read_text() == table
    assert table in (DOCS / "training.md").read_text()
