"""No figure in the docs is typed: tables are made from records."""

from pathlib import Path

from experiments import retrofit_families

import arith
import healing
import matrix
import retrofit
from oasis_attn.records import Record
from oasis_attn.report.markdown import markdown

DOCS = Path(__file__).parents[1] / "docs"


def test_healing() -> None:
    folder = DOCS / "results" / "healing"
    record = Record.load(folder / "record.json")
    table = healing.table(record)
    _, _, gentle, *_, hard = healing.ROWS
    low = f"perplexity, {healing.SCHEME}"
    assert record.metric("perplexity", gentle).value < record.metric("perplexity", hard).value
    assert record.metric("max inf-norm", gentle).value > record.metric("max inf-norm", hard).value
    cost = [
        record.metric(low, x).value / record.metric("perplexity", x).value for x in (gentle, hard)
    ]
    assert cost[0] > cost[1]
    assert (folder / "table.md").read_text() == table
    assert table in (DOCS / "training.md").read_text()


def test_matrix() -> None:
    folder = DOCS / "results" / "quantization"
    table = markdown(matrix.table(Record.load(folder / "record.json")))
    assert (folder / "table.md").read_text() == table
    assert table.split("\n\n", 1)[1].strip() in (DOCS / "quantization.md").read_text()


def test_arith() -> None:
    folder = DOCS / "results" / "arith"
    table = markdown(arith.table(Record.load(folder / "record.json")))
    assert (folder / "table.md").read_text() == table
    assert table in (DOCS / "quantization.md").read_text()


def test_retrofit() -> None:
    folder, page = DOCS / "results" / "retrofit", (DOCS / "retrofit.md").read_text()
    for name, made in (("record", retrofit), ("families", retrofit_families)):
        table = markdown(made.table(Record.load(folder / f"{name}.json")))
        path = folder / ("table.md" if name == "record" else "families.md")
        assert path.read_text() == table
        assert table.strip() in page
