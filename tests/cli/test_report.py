from __future__ import annotations

import json
import subprocess
import sys

import pytest

from example_records import diagnosis
from oasis_attn.records import Metric
from study import factories
from test_records import EXAMPLES


@pytest.fixture
def record(tmp_path):
    metrics = (Metric(name="perplexity.windowed", value=9.0),)
    tables = {"sink.mass": [[0.1, 0.9]]}
    return diagnosis("first", metrics=metrics, tables=tables).save(tmp_path / "first.json")


def test_a_page_with_files_of_its_figures_and_tables(oasis, record, tmp_path) -> None:
    out, figures, tables = tmp_path / "new" / "page.html", tmp_path / "f", tmp_path / "t"
    words = ("report", record, "--out", out, "--figures", figures, "--tables", tables)
    code, (printed, _) = oasis(*words)
    assert code == 0
    written = [*map(str, (out, *figures.iterdir(), *tables.iterdir()))]
    assert sorted(printed.splitlines()) == sorted(written)
    names = {path.name for path in (*figures.iterdir(), *tables.iterdir())}
    assert names >= {
        "first-first-token-mass.png", "first-first-token-mass.svg", "metrics.csv", "metrics.tex",
    }  # fmt: skip
    assert "perplexity.windowed,lower,9" in (tables / "metrics.csv").read_text()
    assert "`" not in out.read_text().partition("<script>")[0].partition("<body>")[2]
    code, (printed, _) = oasis("report", record, "--out", out, "--json")
    assert json.loads(printed) == [str(out)]


def test_folders_and_lines_and_studies_side_by_side(oasis, record, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    EXAMPLES[-2].save(tmp_path / "run" / "record.json")
    lines = tmp_path / "records.jsonl"
    lines.write_text("\n".join(each.to_json(indent=None) for each in EXAMPLES[:2]) + "\n\n")
    plan = factories.plan()
    results = factories.results(plan, lambda trial: 1.0 + trial.seed)
    study = factories.saved(tmp_path / "study", results)
    out = tmp_path / "page.html"
    code, _ = oasis("report", record, tmp_path / "run", lines, study.path, "--out", out)
    assert code == 0
    page = out.read_text()
    assert "<h1>4 records side by side; Study: synthetic</h1>" in page
    assert "Study: synthetic: Key figures" in page
    assert f"{lines}:2" in page


BAD = [
    ("absent.json", "absent.json"),
    ("broken.json", "broken.json"),
    ("unknown.json", "'unknown.json' is not a readable record (kind: 'song'"),
    ("form.json", "record: 'form.json' has an array of an unexpected form"),
    ("empty", "record: 'empty' is a folder with neither record.json nor plan.yaml"),
    ("empty.jsonl", "record: 'empty.jsonl' contains no record"),
    ("broken.jsonl", "'broken.jsonl:2'"),
    ("study", "study: 'study' has no finished trial"),
]


@pytest.mark.parametrize(("name", "message"), BAD, ids=[name for name, _ in BAD])
def test_what_cannot_be_read_is_named_and_nothing_is_written(
    oasis, record, tmp_path, monkeypatch, name, message
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "unknown.json").write_text('{"kind": "song", "version": 1}')
    (tmp_path / "broken.jsonl").write_text(f"{EXAMPLES[0].to_json(indent=None)}\n[]\n")
    diagnosis(tables={"loss": [{"step": 1}]}).save(tmp_path / "form.json")
    factories.saved(tmp_path / "study", factories.Results(factories.plan(), {}))
    before = sorted(tmp_path.rglob("*"))
    words = ("report", record, name, "--out", "new/page.html", "--figures", "f", "--tables", "t")
    code, (out, error) = oasis(*words)
    assert (code, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_output_is_checked_first(oasis, tmp_path) -> None:
    code, (_, error) = oasis("report", "absent.json", "--out", tmp_path)
    assert code == 2
    assert error.startswith("oasis: --out: ")
    code, (_, error) = oasis("report", "absent.json", "--out", "p.html", "--tables", "/proc/x")
    assert error.startswith("oasis: --tables: ")


def test_a_record_is_refused_before_torch_is_imported(tmp_path) -> None:
    code = """
import sys
from oasis_attn.cli import main
sys.argv[0] = "oasis"
print(main(), [name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "report", "absent.json", "--out", str(tmp_path / "p.html")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "2 []\n"
