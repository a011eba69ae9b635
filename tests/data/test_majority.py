"""The corpus `majority`, against its definition word by word."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from itertools import chain, islice, pairwise

import pytest
import torch

from oasis_attn.data import (
    corpus_tokenizer,
    fixed_vocab_size,
    load_corpus,
    read_windows,
    token_blocks,
)
from oasis_attn.data.majority import QUESTION, MajorityTask
from oasis_attn.errors import UserError

SPLITS = ("train", "validation", "test")
WORD = re.compile(r"<([a-z])\d+>")
TASKS = {
    "default": MajorityTask(),
    "other": MajorityTask(window=33, classes=3, class_words=5, rate=0.4, noise=0.2),
}


@pytest.fixture
def few(monkeypatch):
    """Fewer documents."""
    monkeypatch.setattr("oasis_attn.data.majority._TOKENS", 2**16)


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


def some(task: MajorityTask, count: int = 2000) -> list[list[str]]:
    return [text.split() for text in islice(task.documents(), count)]


def test_every_answer_is_the_class_of_most_words_so_far(task):
    for words in some(task):
        assert len(words) == task.window - 2
        assert set(words) <= set(task.vocabulary)
        counts: Counter[str] = Counter()
        for i, (before, word) in enumerate(pairwise(["", *words])):
            if before == QUESTION:
                most = max(counts.values())
                assert word == f"<{min(k for k in counts if counts[k] == most).upper()}>"
            elif word == QUESTION:
                assert i >= 4
                assert WORD.fullmatch(before)
            else:
                counts[WORD.fullmatch(word)[1]] += 1
        assert QUESTION in words[:-1]
        assert words[-1] != QUESTION


def test_rates(task):
    documents = some(task)
    words_only = [[word for word in words if WORD.fullmatch(word)] for words in documents]
    after = [b for words in documents for a, b in pairwise(words[3:-1]) if WORD.fullmatch(a)]
    assert after.count(QUESTION) / len(after) == pytest.approx(task.rate, abs=0.01)
    followers: dict[str, Counter[str]] = {}
    for a, b in (pair for words in words_only for pair in pairwise(words)):
        followers.setdefault(a, Counter())[b] += 1
    successors = {a: found.most_common(1)[0][0] for a, found in followers.items()}
    words = task.classes * task.class_words
    assert len(set(successors.values())) == len(successors) == words
    shares = [found[successors[a]] / found.total() for a, found in followers.items()]
    assert sum(shares) / words == pytest.approx(1 - task.noise + task.noise / words, abs=0.02)


def test_the_text_never_changes():
    """The same for every Python and NumPy; other text would be another corpus to train on."""
    text = "\n".join(islice(MajorityTask().documents(), 500))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "0ec496eb1c737bb5"
    assert next(MajorityTask().documents(seed=1)) != next(MajorityTask().documents())


def test_parts_are_other_documents_of_the_same_language():
    task = MajorityTask()
    parts = [list(islice(task.documents(part=part), 500)) for part in (0, 1, 2)]
    assert len(set(chain(*parts))) == 1500
    successors = []
    for part in parts:
        followers: dict[str, Counter[str]] = {}
        for first, second in pairwise(word for text in part for word in text.split()):
            if WORD.fullmatch(first) and WORD.fullmatch(second):
                followers.setdefault(first, Counter())[second] += 1
        successors.append({word: found.most_common(1)[0][0] for word, found in followers.items()})
    assert successors[0] == successors[1] == successors[2]


@pytest.mark.usefixtures("few")
def test_splits_are_the_whole_and_do_not_overlap():
    parts = {split: list(load_corpus("majority-8", split).texts()) for split in SPLITS}
    documents = [set(part) for part in parts.values()]
    assert sum(map(len, documents)) == len(set.union(*documents))
    whole = list(MajorityTask(window=8).documents())
    assert sorted(whole) == sorted(text for part in parts.values() for text in part)
    assert all(parts.values())


@pytest.mark.usefixtures("few")
def test_one_document_is_one_window():
    corpus = load_corpus("majority-32", "validation")
    tokenizer = corpus_tokenizer(corpus, fixed_vocab_size(corpus))
    windows = read_windows(corpus, tokenizer, window=32, windows=None)
    ids_NT, texts = windows.ids_NT, list(corpus.texts())
    assert len(ids_NT) == len(texts)
    assert (ids_NT[:, 0] == tokenizer.bos_token_id).all()
    assert (ids_NT[:, -1] == tokenizer.eos_token_id).all()
    assert [tokenizer.decode(ids_T[1:-1]) for ids_T in ids_NT] == texts
    assert tokenizer(texts[0])["input_ids"] == ids_NT[0, :-1].tolist()
    assert not (ids_NT == tokenizer.unk_token_id).any()
    assert tokenizer("<a1> other")["input_ids"][-1] == tokenizer.unk_token_id


@pytest.mark.usefixtures("few")
def test_mixed_with_text(tmp_path, monkeypatch):
    rows = "".join(
        json.dumps({"text": f"{i} and {i + 1} are numbers. " * 5}) + "\n" for i in range(99)
    )
    (tmp_path / "prose").mkdir()
    for split in ("train", "validation", "extra"):
        (tmp_path / "prose" / f"{split}.jsonl").write_text(rows)
    monkeypatch.setenv("OASIS_DATA", str(tmp_path))
    corpus = load_corpus("majority-32+prose")
    assert corpus.task == MajorityTask(window=32)
    assert fixed_vocab_size(corpus) is None
    own = list(load_corpus("majority-32").texts())
    assert list(corpus.texts()) == own + list(load_corpus("prose").texts())
    tokenizer = corpus_tokenizer(corpus, 137 + 265)
    assert len(tokenizer) == 137 + 265
    ids_NT = torch.stack(list(token_blocks(corpus, tokenizer, 32)))
    assert (ids_NT[: len(own), -1] == tokenizer.eos_token_id).all()
    assert [tokenizer.decode(ids_T[1:-1]) for ids_T in ids_NT[:9]] == [
        text.replace(" ", "") for text in own[:9]
    ]
    assert tokenizer.decode(ids_NT[len(own), 1:]).startswith("0 and 1 are numbers.")
    with pytest.raises(UserError, match="is not one of train, validation"):
        load_corpus("majority-32+prose", "extra")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MajorityTask(window=7), "window: 7"),
        (lambda: MajorityTask(classes=27), "classes: 27"),
        (lambda: MajorityTask(class_words=0), "class_words: 0"),
        (lambda: MajorityTask(rate=2.0), "rate: 2.0"),
        (lambda: MajorityTask(noise=-1), "noise: -1"),
        (lambda: load_corpus("majority-7"), "corpus: 'majority-7': window: 7"),
        (lambda: load_corpus("majorty"), "did you mean 'majority'"),
        (lambda: load_corpus("majority-64+stdlb"), "did you mean 'stdlib'"),
        (lambda: load_corpus("majority+majority-32"), "has two tasks"),
        (lambda: corpus_tokenizer(load_corpus("majority"), 512), "vocab_size: 512 is not 140"),
        (
            lambda: corpus_tokenizer(load_corpus("majority+pydoc"), 393),
            "vocab_size: 393 is not a whole number of at least 394",
        ),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(UserError, match=message):
        make()
