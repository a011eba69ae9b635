"""No figure in the docs is typed: tables are made from records."""

import re
import shlex
from pathlib import Path

import arith
import healing
import matrix
import retrofit
from oasis_attn.cli import main
from oasis_attn.records import Record
from oasis_attn.report.markdown import markdown
from tiny_models import tiny_model, word_tokenizer

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
    folder = DOCS / "results" / "retrofit"
    table = markdown(retrofit.table(Record.load(folder / "record.json")))
    assert (folder / "table.md").read_text() == table
    assert table.strip() in (DOCS / "retrofit.md").read_text()


def test_view(tmp_path, monkeypatch):
    """Commands and Python run as written, with a tiny model in the place of smollm2."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tiny_model().save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "article.txt").write_text("w5 w6 w7")
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "view.md").read_text().replace("smollm2", "./tiny")
    commands = re.findall(r"^oasis .*", text, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        monkeypatch.setattr("sys.argv", shlex.split(command))
        assert main() == 0
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(compile(code, "view.md", "exec"), {})
    for name in ("view.html", "article.html", "fox.html"):
        assert (tmp_path / name).read_text().startswith("<!doctype html>")
    assert (DOCS / "assets" / "view.png").stat().st_size < 150_000


def test_report(tmp_path, monkeypatch):
    """Commands run as written."""
    (tmp_path / "docs").symlink_to(DOCS)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^oasis .*", (DOCS / "report.md").read_text(), re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        monkeypatch.setattr("sys.argv", shlex.split(command))
        assert main() == 0
    for name in ("training.html", "side-by-side.html", "study.html"):
        assert (tmp_path / name).read_text().startswith("<!doctype html>")
    assert len([*(tmp_path / "figures").glob("*.svg")]) == 5
    assert len([*(tmp_path / "tables").glob("*.tex")]) == 4
