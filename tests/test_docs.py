"""No figure in the docs is typed: tables are made from records."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experiments import engines
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import arith
import healing
import matrix
import served_prefix
from oasis_attn.cli import main
from oasis_attn.hub.convert import convert
from oasis_attn.hub.prefix import compute_prefix, with_prefix
from oasis_attn.quantization import quantize
from oasis_attn.quantization.remedies import REMEDIES
from oasis_attn.records import DoctorRecord, Record
from oasis_attn.report.markdown import markdown
from oasis_attn.report.remedies import doctor_conclusion, doctor_table
from oasis_attn.study.plan_file import parse_plan
from tiny_models import tiny_config, tiny_model, word_tokenizer
from tokenizer_factories import byte_level

DOCS = Path(__file__).parents[1] / "docs"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_to_files_and_headings(page) -> None:
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


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


@pytest.mark.parametrize(
    ("group", "column"), [("prefixes", "prefix"), ("prefixes", "prefix, tuned"), ("nulls", "null")]
)
def test_matrix_can_be_continued(group, column) -> None:
    """Its commands are those that made the models of the record."""
    record = Record.load(DOCS / "results" / "quantization" / "record.json")
    assert record.settings[group][column]["command"] == matrix.described_command(column)


@pytest.mark.parametrize("name", ["formats", "rotations"])
def test_formats_of_hardware_and_rotations(name) -> None:
    folder = DOCS / "results" / "quantization"
    record = Record.load(folder / "record.json")
    table = markdown(getattr(matrix, f"{name}_table")(record))
    assert (folder / f"{name}.md").read_text() == table
    assert table.split("\n\n", 1)[1].strip() in (DOCS / "quantization.md").read_text()


@pytest.mark.parametrize(
    ("row", "column", "limit"),
    [
        ("w4a4, inputs fitted and clipped, GPTQ, calibrated on imdb", "plain", 1.25),
        ("w8a8-static-full, weights per channel, Hadamard", "prefix", 1.25),
        ("w4a16, asymmetric, GPTQ", "plain", 1.12),
        ("w8a8-static-linear, weights per channel, percentile", "prefix", 1.05),
    ],
)
def test_the_best_schemes_of_the_matrix(row, column, limit) -> None:
    found = matrix.values(Record.load(DOCS / "results" / "quantization" / "record.json"))
    assert found[row, column] < limit * found[matrix.FLOAT, "plain"]


def test_what_the_page_says_of_the_formats_of_hardware() -> None:
    record = Record.load(DOCS / "results" / "quantization" / "record.json")
    found = matrix.values(record)
    cost = {
        row: found[row, "plain"] / found[matrix.FLOAT, "plain"] - 1
        for row in matrix.FORMATS
        if (row, "plain") in found
    }
    assert cost["fp8-static"] < 0.05
    assert cost["w8a8-static-linear"] > 0.5
    assert cost[matrix.FULL] < 0.15
    assert cost["w8a8-static-full"] > 1000
    for cell in (("mxfp4", "prefix"), ("mxfp4", "null"), ("mxfp4, Hadamard", "plain")):
        assert 0.9 < found[cell] / found["mxfp4", "plain"] < 1
    for column in ("prefix", "null"):
        assert 0.95 < found["nvfp4", column] / found["nvfp4", "plain"] < 1
        for row in (matrix.FULL, "fp8-static", "fp8-dynamic", "mxfp8"):
            assert 0.999 < found[row, column] / found[row, "plain"] < 1.02
        assert found["w8a8-static-linear", column] < 1.26 * found[matrix.FLOAT, "plain"]
        least = {"prefix": 4, "null": 9}[column]
        assert found["w8a8-static-full", column] > least * found[matrix.FLOAT, "plain"]
        assert found["w8a8-dynamic", column] < 1.02 * found[matrix.FLOAT, "plain"]
        assert 1 < found["w4a4", column] / found["w4a4", "plain"] < 1.1
    assert found["nvfp4, Hadamard", "plain"] > 2 * found["nvfp4", "plain"]
    rotated = {row: found[f"{row}, Hadamard", "plain"] / found[row, "plain"] for row in (
        "fp8-static", "fp8-dynamic", matrix.FULL, "mxfp8", "w8a8-static-linear", "w8a8-static-full"
    )}  # fmt: skip
    assert all(1 < rotated[row] < 1.06 for row in ("fp8-static", "fp8-dynamic", matrix.FULL))
    assert 0.9 < rotated["mxfp8"] < 1
    assert rotated["w8a8-static-linear"] < 0.61
    assert rotated["w8a8-static-full"] < 0.1 < 100 < found["w8a8-static-full, Hadamard", "plain"]
    assert max(cost["nvfp4"], cost["mxfp4"]) < cost["w4a4"] / 10
    assert cost["mxfp8"] > cost["fp8-static"]
    assert cost["mxfp4"] > cost["nvfp4"]
    grouped = {row: found[f"{row}, Hadamard per group", "plain"] for row in matrix.GROUPS}
    for better in (grouped["mxfp4"], found["mxfp4, GPTQ", "plain"]):
        assert better < 0.6 * found["mxfp4", "plain"]
    assert 1 < grouped["mxfp4, GPTQ"] / found["nvfp4, GPTQ", "plain"] < 1.05
    for row in ("nvfp4", "nvfp4, GPTQ"):
        assert grouped[row] > found[row, "plain"]
    assert grouped["mxfp8"] < 1.05 * found[matrix.FLOAT, "plain"]


def test_what_the_page_says_of_rotations() -> None:
    found = matrix.values(Record.load(DOCS / "results" / "quantization" / "record.json"))
    for row in matrix.ROTATED:
        none, folded, hadamard = (
            found[f"{row}{way}", "plain"] for way in ("", ", folded", ", Hadamard")
        )
        if row in ("w4a16", "w4a8"):
            assert none < min(folded, hadamard)
        else:
            assert hadamard < folded < none


def test_arith() -> None:
    folder = DOCS / "results" / "arith"
    table = markdown(arith.table(Record.load(folder / "record.json")))
    assert (folder / "table.md").read_text() == table
    assert table in (DOCS / "quantization.md").read_text()


def test_served_prefix() -> None:
    folder = DOCS / "results" / "served_prefix"
    record = Record.load(folder / "record.json")
    table = markdown(served_prefix.table(record))
    assert (folder / "table.md").read_text() == table
    assert table.strip() in (DOCS / "serving.md").read_text()
    for scheme in served_prefix.SCHEMES:
        rows = (served_prefix.STORED, served_prefix.LEFT_OUT, served_prefix.NONE)
        values = [record.metric("perplexity.windowed", f"{scheme} / {row}").value for row in rows]
        assert values == sorted(values)
        assert len(record.settings["left_out"][scheme]) <= 3


def test_what_the_page_says_of_engines() -> None:
    page = (DOCS / "serving.md").read_text()
    for engine in engines.ROWS:
        record = Record.load(DOCS / "results" / "engines" / f"{engine}.json")
        tables = engines.tables(record, engine)
        assert (DOCS / "results" / "engines" / f"{engine}.md").read_text() == tables
        assert tables.strip() in page
        assert record.settings["engine"].replace(" ", "==") in page
        values = {(metric.name, metric.where): metric.value for metric in record.metrics}
        for (name, where), value in values.items():
            if name == "engine.different_texts":
                assert value == 0
            if name == "engine.rounding_noise":  # as close as two forms here
                assert values["engine.logprob_difference", where] < 1.5 * value
        exact = ["f32"] if engine == "llama.cpp" else [row.name for row in engines.ROWS[engine][:3]]
        limit = 4e-4 if engine == "llama.cpp" else 7e-5
        assert all(values["engine.max_logprob_difference", where] < limit for where in exact)


def test_doctor() -> None:
    record = DoctorRecord.load(DOCS / "results" / "doctor" / "record.json")
    whole = doctor_table(record)
    without_seconds = replace(
        whole, title="", columns=whole.columns[:-1], rows=tuple(row[:-1] for row in whole.rows)
    )
    page = (DOCS / "quantization.md").read_text()
    assert markdown(without_seconds) in page
    said = doctor_conclusion(None, record, [remedy.name for remedy in REMEDIES])
    assert "\n>\n".join(f"> {sentence}" for sentence in said) in page


def test_sink_callback(tmp_path):
    """The Python of the page, given a Trainer."""
    rows = [{"input_ids": ids_T, "labels": ids_T} for ids_T in torch.randint(3, 20, (4, 8))]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    trainer = Trainer(tiny_model(), arguments, train_dataset=rows)
    text = (DOCS / "training.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(compile(code, "training.md", "exec"), {"trainer": trainer})
    trainer.train()
    assert "sink.mass" in trainer.state.log_history[0]


def test_lab_plan():
    text = (DOCS / "lab.md").read_text()
    (plan,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    parse_plan(plan, "mine.yaml").check()


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


def test_serving(tmp_path, monkeypatch):
    """The exports and the Python run as written, with tiny models in the place of theirs."""
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_level()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64}
    model = AutoModelForCausalLM.from_config(tiny_config(**sizes, initializer_range=0.2))
    prefix = compute_prefix(model, [5, 6])
    prefixed = with_prefix(model, prefix)
    prefix.keys_LGPd[:] = prefix.keys_LGPd + 1
    tuned = with_prefix(model, prefix)
    quantized = quantize(model, "w4a16")
    places = {"tiny": model, "prefixed": prefixed, "tuned": tuned, "w4a16": quantized}
    places["oasis-model"] = tiny_model(text=tiny_config(**sizes, initializer_range=0.2))
    places["retrofitted"] = convert(model, "kv_null")
    for layer in places["retrofitted"].model.layers:
        layer.null_logit.data.zero_()
    for name, each in places.items():
        each.save_pretrained(name)
        tokenizer.save_pretrained(name)
    text = (DOCS / "serving.md").read_text().replace("smollm2", "./tiny")
    commands = re.findall(r"^oasis export .*", text, re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        monkeypatch.setattr("sys.argv", shlex.split(command))
        assert main() == 0
    codes = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ids = torch.arange(5, 12)[None]
    for code, want in zip(codes, (tuned, places["oasis-model"]), strict=True):
        names: dict = {}
        exec(compile(code, "serving.md", "exec"), names)
        with torch.no_grad():
            got = names["model"].eval()(input_ids=ids).logits
            torch.testing.assert_close(got, want(ids).logits, rtol=0, atol=1e-4)


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
