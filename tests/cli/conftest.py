"""A fixture that runs the command line, and small inputs for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from oasis_attn.cli import main
from tiny_models import VOCABULARY, tiny_model, word_tokenizer


@pytest.fixture
def oasis(monkeypatch, capsys):
    """`oasis(*words)` -> the exit code and the captured output."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["oasis", *map(str, words)])
        return main(), capsys.readouterr()

    return run


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def model(tmp_path, tokenizer) -> Path:
    """The folder of a tiny model with a tokenizer that has a chat template."""
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}w3 {{ m.content }} w4 {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    """A corpus folder with 300 words of this tokenizer in each of two splits."""
    folder = tmp_path / "text"
    folder.mkdir()
    for split in ("train", "test"):
        line = " ".join(f"w{7 * i % VOCABULARY}" for i in range(300))
        (folder / f"{split}.txt").write_text(line)
    return folder
