"""Tokens of pieces of a text are those of the whole text."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from lm_eval.api.model import TemplateLM
from transformers import PreTrainedTokenizerFast

from oasis_attn.data import load_corpus, token_blocks
from oasis_attn.data.tokens import continuation_ids, prompt_ids, token_texts
from oasis_attn.errors import UserError
from tokenizer_factories import TEXT, byte_level, spaced

SPACED = ("prepend", "first", "always")
PAIRS = [
    ("Question: Ann has 12 pens.\nAnswer:", " Ann now has 12 pens."),
    ("Question: 5\nAnswer:", " 17"),
    ("Answer: ", "17 pens"),  # the blank is the continuation's
    ("Answer:\n\n", "Ann"),
    ("The quick brown", " fox"),
    ("The lazy do", "g, and says so."),  # in the middle of a word
]


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.fixture(params=[*SPACED, "byte_level"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return byte_level() if request.param == "byte_level" else spaced(request.param)


def test_texts_of_tokens_are_the_whole_text(tokenizer):
    text = "The dog,\n\n  says so. " + "ä 🙂" * (tokenizer.unk_token is None)
    ids = plain(tokenizer, text)
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)
    if tokenizer.unk_token is None:
        assert texts[-1] == "🙂"
        assert texts[-2] == ""


def test_the_tokenizers_are_of_the_forms_that_matter():
    for kind in SPACED:
        ids = plain(spaced(kind), "\n\nAnn")
        assert spaced(kind).convert_ids_to_tokens(ids)[:2] == ["\u2581", "\n"]
    assert plain(byte_level(), "\n\nAnn")[0] in plain(byte_level(), "x\n\nAnn")


@pytest.mark.parametrize("pair", PAIRS)
def test_a_continuation_has_the_tokens_of_the_whole_text(tokenizer, pair):
    prompt, text = pair
    given, predicted = continuation_ids(prompt, text, tokenizer)
    assert given + predicted == tokenizer(prompt + text).input_ids
    assert given[0] == tokenizer.bos_token_id
    assert text.strip() in tokenizer.decode(predicted)
    before = prompt.rstrip()
    assert len(tokenizer.decode(given[1:]).strip()) <= len(before)


@pytest.mark.parametrize("pair", PAIRS[:-1])
def test_continuations_are_those_of_lm_eval(tokenizer, pair):
    """But in the middle of a token, where lm-eval cuts the whole text at the prompt's length."""
    harness = SimpleNamespace(backend="causal", tok_encode=lambda text: tokenizer(text).input_ids)
    assert continuation_ids(*pair, tokenizer) == TemplateLM._encode_pair(harness, *pair)


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[1], PAIRS[4]])
def test_byte_level_continuations_keep_the_tokens_they_had_alone(pair):
    tokenizer = byte_level()
    expected = tokenizer(pair[0]).input_ids, plain(tokenizer, pair[1])
    assert continuation_ids(*pair, tokenizer) == expected


def test_a_token_across_the_border_is_the_continuation_s(tokenizer):
    whole = tokenizer("brown").input_ids
    given, predicted = continuation_ids("brow", "n", tokenizer)
    assert given + predicted == whole
    assert "n" in tokenizer.decode(predicted)


def test_without_a_prompt_a_token_that_begins_texts_is_given(tokenizer):
    expected = [tokenizer.bos_token_id], plain(tokenizer, "Ann")
    assert continuation_ids("", "Ann", tokenizer) == expected
    tokenizer.backend_tokenizer.post_processor = None  # it puts nothing in front by itself
    assert continuation_ids("", "Ann", tokenizer) == expected
    tokenizer.bos_token = None
    given, predicted = continuation_ids("", "Ann", tokenizer)
    assert (given, predicted) == ([tokenizer.eos_token_id], expected[1])
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="prompt: it is empty"):
        continuation_ids("", "Ann", tokenizer)


def test_a_continuation_without_tokens(tokenizer):
    with pytest.raises(UserError, match="continuation: '' has no token"):
        continuation_ids("Ann", "", tokenizer)


def test_special_tokens_are_put_once(tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = prompt_ids("Ann has", tokenizer)
    assert ids[0] == bos
    assert bos not in ids[1:]
    again = prompt_ids(f"{tokenizer.bos_token}Ann has", tokenizer)
    assert again.count(bos) == 1
    if bos != eos:
        from tokenizers import processors

        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        assert prompt_ids("Ann has", tokenizer) == ids
        given, predicted = continuation_ids("Ann", " has", tokenizer)
        assert eos not in given + predicted


def test_blocks_hold_each_document_as_the_tokenizer_encodes_it(tokenizer, tmp_path):
    """Documents are texts of their own there, between end-of-text tokens."""
    path = tmp_path / "texts" / "train.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    length = 1 + sum(len(plain(tokenizer, text)) + 1 for text in TEXT)
    (block,) = token_blocks(load_corpus(path.parent), tokenizer, length)
    expected = [tokenizer.bos_token_id]
    for text in TEXT:
        expected += [*plain(tokenizer, text), tokenizer.eos_token_id]
    assert block.tolist() == expected
