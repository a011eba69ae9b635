from __future__ import annotations

import pytest
import torch

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
