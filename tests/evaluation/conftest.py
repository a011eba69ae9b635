import json

import pytest

from oasis_attn.data import train_tokenizer
from tiny_models import tiny_config, tiny_model

LENGTH = 256  # positions of the tiny models


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["Question: Answer: 1 2 3 apples\n#### "], 270)


@pytest.fixture
def build(tokenizer):
    """A tiny model that writes varied text."""

    def make(variant="oasis", family="llama", width=8, reader=tokenizer, **settings):
        text = tiny_config(
            family,
            vocab_size=len(reader),
            max_position_embeddings=LENGTH,
            head_dim=width,
            initializer_range=0.5,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
        return tiny_model(variant, text=text, **settings)

    return make


@pytest.fixture
def data(tmp_path, monkeypatch):
    """`$OASIS_DATA` with a little text and a few problems."""
    folder = tmp_path / "data"
    rows = [
        {"question": f"{i} and 1?", "answer": f"It is <<{i}+1={i + 1}>>.\n#### {i + 1}"}
        for i in range(12)
    ]
    for name, split, part in (("gsm8k", "test", rows[:7]), ("gsm8k", "train", rows[7:])):
        path = folder / name / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    path = folder / "prose" / "test.jsonl"
    path.parent.mkdir()
    path.write_text(
        "".join(json.dumps({"text": f"Apples {i} and more. " * 9}) + "\n" for i in range(9))
    )
    monkeypatch.setenv("OASIS_DATA", str(folder))
    return folder
