"""Files for the tests on a GPU, and the command line there."""

from __future__ import annotations

import pytest
import torch

from gpu.on_device import DEVICE
from oasis_attn.cli import main
from tiny_models import VOCABULARY, word_tokenizer


@pytest.fixture
def folder(tmp_path):
    """`folder(model)` -> a folder with the model and a tokenizer."""

    def save(model, tokenizer=None):
        model.save_pretrained(tmp_path / "model")
        (tokenizer or word_tokenizer()).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.fixture
def text(tmp_path):
    """A corpus folder with 400 words of `word_tokenizer` in each split."""
    (tmp_path / "text").mkdir()
    generator = torch.Generator().manual_seed(2)
    for split in ("train", "validation", "test"):
        ids = torch.randint(3, VOCABULARY, (400,), generator=generator).tolist()
        (tmp_path / "text" / f"{split}.txt").write_text(" ".join(f"w{token}" for token in ids))
    return str(tmp_path / "text")


@pytest.fixture
def oasis(monkeypatch, capsys):
    """`oasis(*words)` -> what the command prints on standard output."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["oasis", *map(str, words), "--device", DEVICE])
        code = main()
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run
