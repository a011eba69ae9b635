"""The command as a user types it, and tiny things to give it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from oasis_attn.cli import main
from tiny_models import VOCABULARY, word_tokenizer


@pytest.fixture
def oasis(monkeypatch, capsys):
    """`oasis(*words)` -> the exit code, and what was printed."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["oasis", *map(str, words)])
        return main(), capsys.readouterr()

    return run


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def text(tmp_path) -> Path:
    """A folder with 300 such words for each of two splits."""
    folder = tmp_path / "text"
    folder.mkdir()
    for split in ("train", "test"):
        line = " ".join(f"w{7 * i % VOCABULARY}" for i in range(300))
        (folder / f"{split}.txt").write_text(line)
    return folder
