"""The task `majority`: accuracy and losses, against a computation token by token."""

from __future__ import annotations

import json
import math

import pytest
import torch

from oasis_attn.data import load_corpus
from oasis_attn.data.majority import QUESTION, MajorityTask
from oasis_attn.data.tokenizer import word_tokenizer
from oasis_attn.errors import UserError
from oasis_attn.evaluation import evaluate
from oasis_attn.quantization import quantize

CORPUS = "majority-32"


@pytest.fixture(autouse=True)
def _few(monkeypatch, tmp_path):
    monkeypatch.setattr("oasis_attn.data.majority._TOKENS", 2**16)
    monkeypatch.setenv("OASIS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def words():
    return word_tokenizer(MajorityTask().vocabulary)


@pytest.fixture
def model(build, words):
    return build("vanilla", reader=words)


def expected(model, words, count: int) -> dict[str, float]:
    answers: list[tuple[bool, float]] = []
    others: list[float] = []
    texts = list(load_corpus(CORPUS, "test").texts())
    for text in [texts[i * len(texts) // count] for i in range(count)]:
        ids = [*words(text)["input_ids"], words.eos_token_id]
        with torch.no_grad():
            logits_TV = model(torch.tensor([ids])).logits[0].double()
        for t in range(1, len(ids)):
            loss = -float(logits_TV[t - 1].log_softmax(-1)[ids[t]])
            if words.convert_ids_to_tokens(ids[t - 1]) == QUESTION:
                answers.append((int(logits_TV[t - 1].argmax()) == ids[t], loss))
            else:
                others.append(loss)
    right, losses = zip(*answers, strict=True)
    return {
        "majority.accuracy": sum(right) / len(answers),
        "majority.answer_loss": math.fsum(losses) / len(answers),
        "majority.other_loss": math.fsum(others) / len(others),
    }


def test_the_metrics_are_those_of_a_loop_over_tokens(model, words):
    options = {"tasks": ["majority", "perplexity"], "corpus": CORPUS, "window": 32, "limit": 9}
    record = evaluate(model, words, batch_size=4, **options)
    found = {m.name: m.value for m in record.metrics if m.name.startswith("majority.")}
    assert found == pytest.approx(expected(model, words, 9), rel=1e-5)
    assert record.data["majority"]["window"] == 32
    assert record.data["majority"]["tokens_sha256"] == record.data["perplexity"]["tokens_sha256"]
    for name, value in found.items():
        low, high = record.intervals[name]
        assert low <= value <= high
        assert record.metric(name).n == 9


@pytest.mark.parametrize("variant", ["vanilla", "oasis"])
def test_a_model_that_knows_the_answers(build, words, variant, monkeypatch):
    """Logits that put the next token first, but for the questions of every other window."""
    model = build(variant, reader=words)

    def forward(input_ids, **_):
        logits_BTV = torch.zeros(*input_ids.shape, len(words))
        next_BT = input_ids.roll(-1, 1)
        next_BT[::2][input_ids[::2] == words.convert_tokens_to_ids(QUESTION)] = 0
        logits_BTV.scatter_(-1, next_BT.unsqueeze(-1), 40.0)
        return type("Output", (), {"logits": logits_BTV})

    monkeypatch.setattr(model, "forward", forward)
    options = {"tasks": ["majority"], "corpus": CORPUS, "limit": 8}
    rows = list(load_corpus(CORPUS, "test").texts())
    questions = [rows[i * len(rows) // 8].count(QUESTION) for i in range(8)]
    record = evaluate(model, words, batch_size=8, **options)
    assert record["majority.accuracy"] == sum(questions[1::2]) / sum(questions)
    assert record["majority.other_loss"] == pytest.approx(0, abs=1e-12)
    wrong = 40 * sum(questions[::2]) / sum(questions)
    assert record["majority.answer_loss"] == pytest.approx(wrong, rel=1e-6)


def test_quantized_and_resumed(model, words, tmp_path):
    options = {"tasks": ["majority"], "corpus": CORPUS, "samples": tmp_path}
    few = evaluate(model, words, limit=3, **options)
    log = tmp_path / "majority.jsonl"
    assert len(log.read_text().splitlines()) == 1 + 3
    again = evaluate(model, words, limit=3, resume=True, **options)
    assert [m.value for m in again.metrics] == [m.value for m in few.metrics]
    sample = json.loads(log.read_text().splitlines()[1])
    assert sample["answers"] + sample["others"] == 31
    other = evaluate(quantize(model, "w4a4"), words, limit=3, resume=True, **options)
    assert other["majority.other_loss"] != few["majority.other_loss"]


def test_a_corpus_with_text_has_the_same_windows(model, words):
    options = {"tasks": ["majority"], "limit": 4}
    alone = evaluate(model, words, corpus=CORPUS, **options)
    mixed = evaluate(model, words, corpus=f"{CORPUS}+pydoc", **options)
    assert mixed.data == alone.data


@pytest.mark.parametrize(
    ("corpus", "reader", "message"),
    [
        ("pydoc", "words", "corpus: 'pydoc' has no majority task"),
        ("majority-512", "words", "window: 512 tokens are more than the model.s 256 positions"),
        (CORPUS, "bytes", "tokenizer: it has no token '<\\?>'"),
    ],
)
def test_what_does_not_fit(build, words, tokenizer, corpus, reader, message):
    read = words if reader == "words" else tokenizer
    with pytest.raises(UserError, match=message):
        evaluate(build(reader=read), read, tasks=["majority"], corpus=corpus)
