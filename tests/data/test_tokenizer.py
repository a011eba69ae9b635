from __future__ import annotations

import pytest
from transformers import ByT5Tokenizer

from oasis_attn.data import corpus_tokenizer, load_corpus, tokenizer_sha256, train_tokenizer
from oasis_attn.errors import UserError

TEXTS = ["the cat sat on the mat, the end", "def f(x):\n    return x + 1234\n"] * 20


@pytest.mark.parametrize("text", ["the cat", "naïve 漢字 🙂\t\n  x", "\x00\x7f", " 12 345", ""])
def test_any_text_comes_back(text):
    tokenizer = train_tokenizer(TEXTS, 280)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_one_special_token_in_front():
    tokenizer = train_tokenizer(TEXTS, 280)
    assert len(tokenizer) == 280
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert ends == {0}
    assert tokenizer("the")["input_ids"][0] == 0
    assert 0 not in tokenizer("the")["input_ids"][1:]


def test_digits_are_kept_apart():
    tokenizer = train_tokenizer(["1234 1234 1234"] * 50, 280)
    assert len(tokenizer("1234", add_special_tokens=False)["input_ids"]) == 4


def test_same_text_same_tokenizer_and_hash_ignores_the_last_call():
    one, two = train_tokenizer(TEXTS, 280), train_tokenizer(TEXTS, 280)
    two(["a", "b c d"], padding=True, truncation=True, max_length=3)
    assert tokenizer_sha256(one) == tokenizer_sha256(two)
    assert tokenizer_sha256(one) != tokenizer_sha256(train_tokenizer(TEXTS, 270))


def test_round_trip_through_a_folder(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(TEXTS, 280)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_sha256(again) == tokenizer_sha256(tokenizer)
    assert again("the cat 7")["input_ids"] == tokenizer("the cat 7")["input_ids"]


def test_corpus_tokenizer_is_cached(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("\n\n".join(TEXTS))
    corpus = load_corpus(tmp_path)
    first = corpus_tokenizer(corpus, 280)
    monkeypatch.setattr("oasis_attn.data.tokenizer._learnt", None)
    assert tokenizer_sha256(corpus_tokenizer(corpus, 280)) == tokenizer_sha256(first)


def test_one_written_in_python_is_refused():
    with pytest.raises(UserError, match="tokenizer: ByT5Tokenizer has no fast form"):
        tokenizer_sha256(ByT5Tokenizer())


def test_vocabulary_smaller_than_the_bytes():
    with pytest.raises(UserError, match="vocab_size: 256 is not a whole number of at least 257"):
        train_tokenizer(TEXTS, 256)
