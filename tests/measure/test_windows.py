from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oasis_attn.errors import UserError
from oasis_attn.measure.windows import cut_windows
from oasis_attn.records import TextInfo


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    letters = {letter: number for number, letter in enumerate("^abcdefgh\n")}
    inner = Tokenizer(models.WordLevel(letters, unk_token="^"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def cut(texts, window=4, windows=16, reader=None, vocabulary=10):
    return cut_windows(
        texts, tokenizer=reader, window=window, windows=windows, vocabulary=vocabulary
    )


def test_bos_begins_every_window_and_takes_a_place():
    ids_NT = cut("abcdefgh", reader=tokenizer(bos_token="^"))
    assert ids_NT.tolist() == [[0, 1, 2, 3], [0, 4, 5, 6]]
    found = TextInfo.of(ids_NT, {"corpus": "letters"})
    assert found == TextInfo(
        corpus="letters", split=None, sha256=None, window=4, windows=2, windowing="disjoint", bos=0,
        tokens_scored=6, tokens_sha256=found.tokens_sha256,
    )  # fmt: skip
    for wrong in ({"corpora": "letters"}, {"split": 3}):
        with pytest.raises(UserError, match=r"^data: .*(corpora|split)"):
            TextInfo.of(ids_NT, wrong)


def test_without_bos_a_window_is_text_alone():
    ids_NT = cut("abcdefgh", reader=tokenizer())
    assert ids_NT.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert TextInfo.of(ids_NT, {}).bos is None


def test_documents_are_joined_by_a_blank_line():
    assert cut(["ab", "cdef"], reader=tokenizer()).tolist() == [[1, 2, 9, 9], [3, 4, 5, 6]]


def test_no_more_text_is_read_than_is_needed():
    def texts():
        yield "abcdefgh"
        raise AssertionError("read too far")

    assert cut(texts(), windows=2, reader=tokenizer()).shape == (2, 4)


@pytest.mark.parametrize("rows", [torch.arange(12).view(3, 4) % 10, [[1, 2, 3, 4], [5, 6, 7, 8]]])
def test_rows_are_windows_as_they_stand(rows):
    expected = torch.as_tensor(rows)[:2]
    assert torch.equal(cut(rows, window=None, windows=2), expected)
    assert torch.equal(cut(rows, window=4, windows=2), expected)


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ("", {"reader": tokenizer()}, "texts: 0 tokens are fewer than one window of 4"),
        ("abc", {"reader": tokenizer()}, "texts: 3 tokens are fewer than one window of 4"),
        ([], {}, "nothing to read"),
        ("abcd", {}, "tokenizer: None cannot read text"),
        ([[1, 2], [1, 2, 3]], {"window": None}, "all must be"),
        ([[[1, 2]]], {"window": None}, "all must be"),
        ([1, 2, 3], {"window": None}, "all must be"),
        ([[1, 2, 3]], {}, "rows of 3 tokens; allowed are 4"),
        ([[1]], {"window": None}, "rows of 1 tokens; allowed are at least 2"),
        ([[0.5, 1.5]], {"window": None}, "dtype torch.float32 is not an integer type"),
        ([[1, 10]], {"window": None}, "tokens: 10 is outside the model's vocabulary of 10"),
        ([[-1, 5]], {"window": None}, "tokens: -1 is outside"),
        ("abcd", {"window": 1}, "window: 1 is not a whole number from 2 to"),
        ("abcd", {"windows": 0}, "windows: 0 is not a whole number from 1 to"),
    ],
)
def test_bad_input_is_named(texts, settings, message):
    with pytest.raises(UserError, match=message):
        cut(texts, **settings)
