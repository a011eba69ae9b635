from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from oasis_attn.data import read_windows
from oasis_attn.evaluation.likelihood import score_continuations, score_windows
from oasis_attn.evaluation.samples import SampleLog
from oasis_attn.measure import diagnose
from oasis_attn.ops.token_losses import CHUNK, token_losses
from tokenizer_factories import byte_level, spaced

TEXTS = ["Question: 1 2 3 apples. " * 4, "Answer: 3 2 1\n" * 6]


def log():
    return SampleLog(None, {}, resume=False)


@pytest.mark.parametrize("tokens", [1, 2, CHUNK, CHUNK + 1, CHUNK + 2])
def test_token_losses_are_the_log_softmax(tokens):
    logits_BTV = torch.randn(2, tokens, 7, dtype=torch.float64)
    ids_BT = torch.randint(7, (2, tokens))
    expected = -logits_BTV.log_softmax(-1)[:, :-1].gather(-1, ids_BT[:, 1:, None])[..., 0]
    torch.testing.assert_close(token_losses(logits_BTV, ids_BT), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 5, 15])
def test_strides_score_each_token_once(build, tokenizer, stride):
    model = build(dtype=torch.float64)
    windows = read_windows(TEXTS, tokenizer, window=16, windows=None, stride=stride)
    text = [t for each in TEXTS for t in [*tokenizer(each).input_ids[1:], tokenizer.eos_token_id]]
    rows = score_windows(model, windows, log=log(), batch_size=3)
    # Token by token: the context is that of the first window that holds the token.
    expected, last = 0.0, (len(windows) - 1) * stride + 15
    with torch.no_grad():
        for at in range(last):
            start = 0 if at < 15 else -(-(at - 14) // stride) * stride
            ids = torch.tensor([[tokenizer.bos_token_id, *text[start : at + 1]]])
            expected += float(token_losses(model(ids).logits, ids)[0, -1])
    assert sum(row["tokens"] for row in rows) == last
    assert sum(row["loss"] for row in rows) == pytest.approx(expected, rel=1e-12)


def test_a_log_is_resumed_with_more_windows(build, tokenizer):
    model, kept = build(), log()
    few, all_of_them = (
        read_windows(TEXTS, tokenizer, window=16, windows=windows) for windows in (2, None)
    )
    rows = score_windows(model, few, log=kept, batch_size=1)
    again = score_windows(model, all_of_them, log=kept, batch_size=1)
    assert [row["id"] for row in again] == list(range(len(all_of_them)))
    assert all(again[row["id"]] is row for row in rows)
    assert again == score_windows(model, all_of_them, log=log(), batch_size=1)


def test_without_overlap_it_is_the_diagnosis_s_perplexity(build, tokenizer):
    model = build()
    windows = read_windows(TEXTS, tokenizer, window=16, windows=5)
    rows = score_windows(model, windows, log=log(), batch_size=2)
    record = diagnose(model, TEXTS, tokenizer=tokenizer, window=16, windows=5)
    loss = sum(row["loss"] for row in rows) / sum(row["tokens"] for row in rows)
    assert loss == pytest.approx(record["loss.windowed"], rel=1e-6)
    assert windows.info == record.data


def test_through_a_cache_it_is_the_same(build, tokenizer):
    model = build(dtype=torch.float64)
    windows = read_windows(TEXTS, tokenizer, window=40, windows=3)
    pairs = [("Question: 1", " 2 3" * 20), ("x", " apples" * 5)]
    found = []
    for cache in (None, lambda config: DynamicCache(config=config)):
        rows = score_windows(model, windows, log=log(), batch_size=2, cache=cache)
        rows += score_continuations(model, tokenizer, pairs, log=log(), batch_size=2, cache=cache)
        found.append([row["loss"] for row in rows])
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_continuations_are_scored_as_if_alone(build, tokenizer):
    model = build(dtype=torch.float64)
    pairs = [("Question: 1", " 2 3"), ("x", " apples" * 5), ("Question: 1 2 3\nAnswer:", " 1")]
    rows = score_continuations(model, tokenizer, pairs, log=log(), batch_size=2)
    for row, (prompt, text) in zip(rows, pairs, strict=True):
        front = tokenizer(prompt).input_ids
        back = tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            logp_TV = model(torch.tensor([front + back])).logits[0].log_softmax(-1)
        expected = -sum(float(logp_TV[len(front) - 1 + i, t]) for i, t in enumerate(back))
        assert (row["tokens"], row["loss"]) == (len(back), pytest.approx(expected, rel=1e-12))


@pytest.mark.parametrize("kind", ["prepend", "first", "always", "byte_level"])
def test_likelihoods_are_of_the_text_s_own_tokens(build, kind):
    """A tokenizer that puts a space before every text does not put one before a continuation."""
    reader = byte_level() if kind == "byte_level" else spaced(kind)
    model = build(dtype=torch.float64, reader=reader)
    pairs = [("Question: 5\nAnswer:", " Ann now has 12 pens."), ("The", " quick fox")]
    rows = score_continuations(model, reader, pairs, log=log(), batch_size=2)
    for row, (prompt, text) in zip(rows, pairs, strict=True):
        whole = reader(prompt + text).input_ids
        given = len(reader(prompt).input_ids)
        with torch.no_grad():
            logp_TV = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        expected = -sum(float(logp_TV[at - 1, whole[at]]) for at in range(given, len(whole)))
        assert (row["tokens"], row["loss"]) == (
            len(whole) - given,
            pytest.approx(expected, rel=1e-12),
        )
