from __future__ import annotations

import pytest
import torch

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


@pytest.fixture
def plain(corpus, size):
    """A function that returns the values of a tiny plan, with changes."""

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
            "schemes": ["w8a8-static-full", "w4a4"],
            "evaluation": {"limit": 2, "max_new_tokens": 2},
        }
        return {name: value for name, value in (small | changes).items() if value is not None}

    return plan


@pytest.fixture
def tiny(plain):
    """A function that returns a tiny plan, with changes."""
    return lambda **changes: Plan.from_dict(plain(**changes))
