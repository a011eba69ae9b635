"""The commands of docs/quantization.md run, and numbers are equal where the page says so."""

from __future__ import annotations

import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from oasis_attn.cli import main
from oasis_attn.evaluation import evaluate
from oasis_attn.records import Record
from quantization.exported_models import has_int8_kernels
from tiny_models import VOCABULARY, tiny_config, word_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text(encoding="utf-8")
RECIPE = re.search(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SERVED = re.findall(r"^oasis quantize .*--out (?:int8|w8a8|w4a16|rotated)$", PAGE, re.MULTILINE)
FLOATS = re.findall(r"^oasis quantize .*--scheme (?:mx|nv)fp4.*$", PAGE, re.MULTILINE)
WINDOW, WINDOWS = 16, 3


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Words of a command with a small model, whose first position is a sink, and a small corpus."""
    torch.manual_seed(0)
    config = tiny_config("opt", ffn_dim=48, word_embed_proj_dim=32, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_decoder().embed_positions.weight[2, 3] = 1e4
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    for split, step in (("train", 7), ("test", 11)):
        line = " ".join(f"w{step * i % VOCABULARY}" for i in range(300))
        (tmp_path / "text" / f"{split}.txt").write_text(line)
    monkeypatch.chdir(tmp_path)
    names = {"smollm2": "model", "pydoc": "text", "16": str(WINDOWS)}

    def words(line: str) -> list[str]:
        small = [names.get(word, word) for word in shlex.split(line)]
        small += ["--window", str(WINDOW)]
        if "--corpus" not in small and "--calibration" not in small:
            small += ["--calibration", "text"]
        return small if small[1] == "evaluate" else [*small, "--windows", str(WINDOWS)]

    return words


def test_the_recipe(small, monkeypatch, tmp_path):
    assert RECIPE is not None
    lines = RECIPE[1].splitlines()
    assert [line.split()[1] for line in lines] == [
        "diagnose", "prefix", "diagnose", "quantize", "evaluate",
    ]  # fmt: skip
    for line in lines:
        monkeypatch.setattr(sys, "argv", small(line))
        assert main() == 0

    prefix, quantized = (
        Record.load(tmp_path / name / "record.json") for name in ("prefixed", "quantized")
    )
    options = {"corpus": "text", "split": "test", "window": WINDOW, "limit": WINDOWS}

    def alone(name: str) -> float:
        return evaluate(name, **options)["perplexity.windowed"]

    def both(record: Record, metric: str) -> tuple[float, float]:
        return record.metric(metric, "before").value, record.metric(metric, "after").value

    without, with_prefix = both(prefix, "perplexity.windowed")
    assert both(quantized, "perplexity.windowed") == (
        with_prefix,
        prefix.metric("perplexity.quantized", "after").value,
    )
    for name, value in (
        ("model", without),
        ("prefixed", with_prefix),
        ("quantized", quantized.metric("perplexity.windowed", "after").value),
    ):
        assert math.isclose(alone(name), value, rel_tol=1e-6), name


def test_the_commands_before_serving(small, monkeypatch, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    # Not OPT: of its flat tokens, the library computes one dynamic range for a whole batch.
    AutoModelForCausalLM.from_config(tiny_config(intermediate_size=64)).save_pretrained("model")
    assert len(SERVED) == 4
    for line in SERVED:
        if "torchao" in line and not has_int8_kernels():
            continue
        monkeypatch.setattr(sys, "argv", small(line))
        assert main() == 0
        folder = tmp_path / shlex.split(line)[-1]
        after = Record.load(folder / "record.json").metric("perplexity.windowed", "after").value
        found = evaluate(str(folder), corpus="text", split="test", window=WINDOW, limit=WINDOWS)
        assert math.isclose(found["perplexity.windowed"], after, rel_tol=1e-6)


def test_the_commands_of_hardware_formats(small, monkeypatch, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    AutoModelForCausalLM.from_config(tiny_config(intermediate_size=64)).save_pretrained("model")
    assert len(FLOATS) == 2
    for line in FLOATS:
        monkeypatch.setattr(sys, "argv", small(line))
        assert main() == 0
        assert Record.load(tmp_path / shlex.split(line)[-1] / "record.json").scheme["name"] in line
