from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig

from oasis_attn.study.plan import Plan


@pytest.fixture(scope="session")
def _shared(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(autouse=True)
def _own_cache(_shared, monkeypatch):
    monkeypatch.setenv("OASIS_CACHE", str(_shared / "cache"))


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpus(_shared) -> str:
    """Sums, written out: the same text on every machine."""
    folder = _shared / "sums"
    folder.mkdir()
    for split, start in (("train", 0), ("validation", 400)):
        rows = [{"text": f"{i} and {i * 7} make {i * 8}. " * 3} for i in range(start, start + 200)]
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
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
    ).to_json_file(path)
    return str(path)


@pytest.fixture
def plain(corpus, size):
    """A tiny plan as YAML would give it, with changes."""

    def plan(**changes):
        small = {
            "name": "tiny",
            "about": "Nothing.",
            "variants": ["vanilla", "oasis"],
            "corpora": {corpus: ["arith"]},
            "seeds": [0],
            "sizes": [size],
            "compare": {"oasis": ["vanilla"]},
            "training": {
                "steps": 4,
                "batch_size": 2,
                "block_length": 32,
                "vocab_size": 270,
                "log_every": 1,
                "eval_windows": 2,
                "learning_rate": 1e-2,
            },
            "windows": 3,
            "schemes": ["w8a8-static", "w4a4"],
            "evaluation": {"limit": 2, "max_new_tokens": 2},
        }
        return {name: value for name, value in (small | changes).items() if value is not None}

    return plan


@pytest.fixture
def tiny(plain):
    """A tiny plan, with changes."""
    return lambda **changes: Plan.from_dict(plain(**changes))
