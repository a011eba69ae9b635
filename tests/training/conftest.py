from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig

from oasis_attn.training import TrainingConfig


@pytest.fixture(scope="session")
def _shared(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(autouse=True)
def _own_cache(_shared, monkeypatch):
    monkeypatch.setenv("OASIS_CACHE", str(_shared / "cache"))
    monkeypatch.delenv("OASIS_DATA", raising=False)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpus(_shared) -> str:
    """Sums, written out: the same text on every machine."""
    folder = _shared / "sums"
    folder.mkdir()
    for split, start in (("train", 0), ("validation", 400)):
        rows = [{"text": f"{i} and {i * 7} make {i * 8}. " * 3} for i in range(start, start + 300)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return str(folder)


@pytest.fixture(scope="session")
def size(_shared) -> str:
    path = _shared / "tiny.json"
    LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
    ).to_json_file(path)
    return str(path)


@pytest.fixture
def configure(corpus, size, tmp_path):
    """A config of the tiny run: 20 steps of 4 x 32 tokens."""

    def config(out="run", **changes) -> TrainingConfig:
        small = {
            "out": tmp_path / out,
            "corpus": corpus,
            "size": size,
            "vocab_size": 270,
            "steps": 20,
            "block_length": 32,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "save_every": 4,
            "log_every": 1,
            "eval_windows": 4,
        }
        return TrainingConfig(**small | changes)

    return config
