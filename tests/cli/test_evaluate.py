from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from typer.main import get_command

from oasis_attn.cli import app
from oasis_attn.data import train_tokenizer
from oasis_attn.evaluation import EvaluationConfig
from oasis_attn.records import EvaluationRecord
from tiny_models import tiny_config, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["x"], 257)
    text = tiny_config(vocab_size=257, max_position_embeddings=512, eos_token_id=0)
    tiny_model(text=text).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_tasks_as_a_table_and_as_json(oasis, folder, tmp_path) -> None:
    words = ["evaluate", str(folder), "--tasks", "perplexity,arith", "--corpus", "arith"]
    words += ["--window", "64", "--limit", "3", "--k", "1,2", "--repeats", "2"]
    words += ["--temperature", "1", "--max-new-tokens", "4", "--samples", str(tmp_path / "log")]
    out = tmp_path / "record.json"
    code, (shown, _) = oasis(*words, "--out", str(out))
    assert code == 0
    assert {"perplexity.windowed", "arith.pass@2.strict"} <= set(shown.split())
    assert {path.name for path in (tmp_path / "log").iterdir()} == {
        "arith.jsonl",
        "perplexity.jsonl",
    }
    code, (shown, _) = oasis(*words, "--resume", "--json")
    assert code == 0
    again, record = json.loads(shown), EvaluationRecord.load(out)
    assert again["kind"] == record.kind == "evaluation"
    assert again["metrics"] == json.loads(record.to_json())["metrics"]
    code, (_, err) = oasis(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert "exists; resume it" in err


def test_the_cache_in_few_bits(oasis, tmp_path) -> None:
    text = tiny_config(vocab_size=257, max_position_embeddings=512, eos_token_id=0, head_dim=32)
    tiny_model(text=text).save_pretrained(tmp_path)
    train_tokenizer(["x"], 257).save_pretrained(tmp_path)
    words = ["evaluate", str(tmp_path), "--tasks", "perplexity,arith", "--corpus", "arith"]
    words += ["--window", "256", "--limit", "2", "--max-new-tokens", "3", "--json"]
    losses = {}
    for bits in ("none", "8", "2"):
        options = [] if bits == "none" else ["--kv-bits", bits]
        code, (shown, _) = oasis(*words, *options)
        assert code == 0
        record = json.loads(shown)
        losses[bits] = next(m["value"] for m in record["metrics"] if m["name"] == "loss.windowed")
        assert record["model_notes"].get("kv_cache", {}).get("bits") == (
            None if bits == "none" else int(bits)
        )
    assert 0 < abs(losses["8"] - losses["none"]) < abs(losses["2"] - losses["none"])


def test_help_has_an_example(oasis) -> None:
    code, (out, _) = oasis("evaluate", "--help")
    assert code == 0
    assert "Example: oasis evaluate" in " ".join(out.split())
    assert "--json" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "arit"], "did you mean 'arith'"),
        (["--k", "one"], "--k: 'one'"),
        (["--k", "2"], "k: 2"),
        (["--kv-bits", "3"], "bits: 3 is not one of 2, 4, 8"),
        (["--kv-bits", "4", "--window", "159"], "window: 159 tokens are too few"),
        (["--out", "."], "out: '.' is a folder"),
        (["--out", f"{__file__}/x.json"], "is a file"),
        (["--samples", __file__], "is a file"),
        (["--corpus", "wikitext2"], "did you mean 'wikitext-2'"),
        (["--resume"], "resume: it needs samples"),
        (["--tasks", "arith"], "./absent"),
    ],
)
def test_bad_input_is_one_line_and_code_2_and_writes_nothing(
    oasis, monkeypatch, tmp_path: Path, words, message
) -> None:
    monkeypatch.chdir(tmp_path)
    code, (out, err) = oasis("evaluate", "./absent", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_there_is_an_option_for_every_field_with_its_default() -> None:
    options = {p.name: p.default for p in get_command(app).commands["evaluate"].params}
    for field in fields(EvaluationConfig):
        if field.name in ("tasks", "k"):
            assert options[field.name] == ",".join(map(str, field.default))
        elif field.name == "cache":
            assert options["kv_bits"] is None
        elif field.default is not MISSING:
            assert options[field.name] == field.default, field.name
