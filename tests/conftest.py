from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig

from tiny_models import VOCABULARY


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill uninitialized tensors with NaN: whatever reads one shows it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def own_extensions(monkeypatch):
    """The library's own names alone are registered; what a test registers is gone when it ends."""
    from oasis_attn import extension_files
    from oasis_attn.modeling.extensions import BRANCH_NORMS, NULL_SIGNALS
    from oasis_attn.ops.normalizers import TOKEN_NORMALIZERS

    monkeypatch.delenv(extension_files.EXTENSIONS_VARIABLE, raising=False)
    monkeypatch.setattr(extension_files, "_loaded", {})
    for registry in (BRANCH_NORMS, NULL_SIGNALS, TOKEN_NORMALIZERS):
        own = {name: registry[name] for name in registry if name in registry.own}
        monkeypatch.setattr(registry, "_entries", own)


@pytest.fixture
def ids():
    """Tokens for a model of `tiny_models`: 2 sequences of 12."""
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """Sums, written out: the same text on every machine."""
    folder = tmp_path_factory.mktemp("corpus") / "sums"
    folder.mkdir()
    for split, start in (("train", 0), ("validation", 400)):
        rows = [{"text": f"{i} and {i * 7} make {i * 8}. " * 3} for i in range(start, start + 300)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return str(folder)


@pytest.fixture(scope="session")
def size(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("size") / "tiny.json"
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
