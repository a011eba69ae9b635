from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from oasis_attn.data import blocks as blocks_module
from oasis_attn.data import collate, load_corpus, token_blocks, train_tokenizer
from oasis_attn.errors import UserError

DOCUMENTS = [f"document {i} says {'word ' * (i % 7)}<|endoftext|>" for i in range(200)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus" / "train.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return load_corpus(path.parent)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 280)


def stream(tokenizer) -> list[int]:
    """The packed tokens, by an independent road: one document at a time, through the backend."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    ids = []
    for text in DOCUMENTS:
        ids += [*backend.encode(text, add_special_tokens=False).ids, tokenizer.eos_token_id]
    return ids


@pytest.mark.parametrize("length", [2, 7, 64])
def test_packing(corpus, tokenizer, length):
    blocks = token_blocks(corpus, tokenizer, length)
    expected = stream(tokenizer)
    assert len(blocks) == len(expected) // (length - 1)
    tokens_NT = torch.stack([blocks[i] for i in range(len(blocks))])
    assert tokens_NT.dtype == torch.int64
    assert tokens_NT.shape == (len(blocks), blocks.block_length) == (len(blocks), length)
    assert (tokens_NT[:, 0] == tokenizer.bos_token_id).all()
    assert tokens_NT[:, 1:].flatten().tolist() == expected[: len(blocks) * (length - 1)]


def test_special_token_inside_text_is_text(corpus, tokenizer):
    blocks = token_blocks(corpus, tokenizer, 64)
    inside = sum(int((blocks[i][1:] == 0).sum()) for i in range(len(blocks)))
    assert inside <= len(DOCUMENTS)


def test_file_is_a_memory_mapped_npy_of_the_smallest_type(corpus, tokenizer):
    blocks = token_blocks(corpus, tokenizer, 16)
    assert np.load(blocks.path).dtype == np.uint16
    assert isinstance(blocks.tokens_NT, np.memmap)
    wide = token_blocks(corpus, tokenizer, 16, vocab_size=2**16 + 1)
    assert np.load(wide.path).dtype == np.int32
    assert torch.equal(wide[3], blocks[3])


def test_cache_follows_content(corpus, tokenizer, monkeypatch):
    first = token_blocks(corpus, tokenizer, 16)
    with monkeypatch.context() as patch:
        patch.setattr(blocks_module, "_write_blocks", None)
        again = token_blocks(corpus, tokenizer, 16)
    assert (again.path, again.sha256) == (first.path, first.sha256)
    other = [
        token_blocks(corpus, tokenizer, 17),
        token_blocks(corpus, train_tokenizer(DOCUMENTS, 270), 16),
    ]
    assert len({first.path, *(blocks.path for blocks in other)}) == 3


def test_stopped_while_writing_leaves_nothing(corpus, tokenizer, monkeypatch, tmp_path):
    def stop(file, *_):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(blocks_module, "_write_blocks", stop)
        with pytest.raises(KeyboardInterrupt):
            token_blocks(corpus, tokenizer, 16)
    assert not list((tmp_path / "cache" / "blocks").iterdir())
    assert len(token_blocks(corpus, tokenizer, 16)) > 1


def test_two_writers_at_once(corpus, tokenizer):
    found: list[str] = []
    writers = [
        threading.Thread(target=lambda: found.append(token_blocks(corpus, tokenizer, 16).sha256))
        for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(found) == 2
    assert len(set(found)) == 1


def test_batches(corpus, tokenizer):
    blocks = token_blocks(corpus, tokenizer, 16)
    batch = collate([blocks[0], blocks[1]])
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (2, 16)
    assert torch.equal(batch["input_ids"], batch["labels"])


def test_bad_input(corpus, tokenizer, tmp_path):
    with pytest.raises(
        UserError, match=r"split .train. has \d+ tokens, which is less than one window of 1000000"
    ):
        token_blocks(corpus, tokenizer, 1_000_000)
    with pytest.raises(UserError, match="block_length: 1 is not a whole number of at least 2"):
        token_blocks(corpus, tokenizer, 1)
    with pytest.raises(UserError, match="outside the model's vocabulary of 260"):
        token_blocks(corpus, tokenizer, 16, vocab_size=260)
    assert not list(Path(tmp_path, "cache", "blocks").iterdir())


def test_without_special_tokens_blocks_are_text_alone(corpus, tokenizer):
    plain = train_tokenizer(DOCUMENTS, 280)
    plain.bos_token = plain.eos_token = None
    blocks = token_blocks(corpus, plain, 16)
    expected = [token for token in stream(tokenizer) if token != tokenizer.eos_token_id]
    assert torch.stack(list(blocks)).flatten().tolist() == expected[: 16 * len(blocks)]
