"""No figure in the docs is typed: tables are made from records; and no measure is missing."""

import re
from pathlib import Path

import torch

import arith
import healing
import matrix
from oasis_attn import diagnose
from oasis_attn.records import Record
from oasis_attn.report.markdown import markdown
from tiny import VOCABULARY, tiny_model

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


def test_measures() -> None:
    tokens = torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    record = diagnose(tiny_model(), tokens, joint=True, causal=[0])
    measured = {metric.name.removesuffix("_no_op@0.1") for metric in record.metrics}
    measured = {re.sub(r"@.*", "@eps", name) for name in measured}
    measured = {
        name.removesuffix("_renormalised") if name.startswith("joint.") else name
        for name in measured
    }
    _, _, rest = (DOCS / "method.md").read_text().partition("| metric | definition |\n")
    rows = rest.partition("\n\n")[0].splitlines()
    assert measured == {name for row in rows for name in re.findall("`(.*?)`", row.split(" | ")[0])}
