from __future__ import annotations

import hashlib

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oasis_attn.data import (
    Corpus,
    as_windows,
    held_out_windows,
    load_corpus,
    read_windows,
    token_blocks,
    whole_file,
)
from oasis_attn.errors import UserError
from oasis_attn.records import TextInfo

LETTERS = "^abcdefgh\n$"  # ^ is BOS, $ is EOS; a letter's token is its place here
DOCUMENTS = ["abc", "defgh", "a", "bcdefgh" * 3, " ", "hgfedcba"]


def reader(bos: str | None = "^", eos: str | None = "$") -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="^"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos)


def cut(texts, window=4, windows=16, tokenizer=None, vocab_size=11, **options):
    return as_windows(
        texts,
        tokenizer=tokenizer,
        window=window,
        windows=windows,
        vocab_size=vocab_size,
        **options,
    )


def corpus(documents=DOCUMENTS) -> Corpus:
    return Corpus(name="letters", split="test", reader=lambda: iter(documents))


def stream(documents=DOCUMENTS) -> list[int]:
    """The tokens of the documents, each followed by EOS."""
    return [LETTERS.index(c) for text in documents if text.strip() for c in f"{text}$"]


def test_bos_begins_every_window_and_eos_ends_every_document():
    found = cut(["abc", "de"], tokenizer=reader())
    assert found.ids_NT.tolist() == [[0, 1, 2, 3], [0, 10, 4, 5]]
    assert found.ids_NT.dtype == torch.int64


def test_the_protocol_is_recorded():
    found = cut("abcdefgh", tokenizer=reader(), source={"corpus": "letters"})
    digest = hashlib.sha256(found.ids_NT.numpy().tobytes()).hexdigest()
    assert found.info == TextInfo(
        corpus="letters", split=None, sha256=None, window=4, windows=3, stride=4, choice="spread",
        separator=10, bos=0, tokens_scored=9, tokens_sha256=digest,
    )  # fmt: skip
    text = corpus()
    info = read_windows(text, reader(), window=4, windows=2).info
    assert (info.corpus, info.split, info.sha256) == ("letters", "test", text.sha256)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (reader(bos=None), [[10, 1, 2, 3], [10, 10, 4, 5]]),
        (reader(eos=None), [[0, 1, 2, 3], [0, 0, 4, 5]]),
        (reader(None, None), [[1, 2, 3, 4]]),
    ],
)
def test_a_missing_special_token_is_replaced_or_left_out(tokenizer, expected):
    found = cut(["abc", "de"], tokenizer=tokenizer)
    assert found.ids_NT.tolist() == expected
    known = [i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None]
    assert found.info.separator == (known[0] if known else None)


@pytest.mark.parametrize("windows", [1, 2, 3, 5, 99, None])
def test_windows_are_spread_over_the_whole_text(windows):
    blocks = token_blocks(corpus(), reader(), 4)
    found = read_windows(corpus(), reader(), window=4, windows=windows)
    count = min(windows or 99, len(blocks))
    assert found.positions == tuple(i * len(blocks) // count for i in range(count))
    assert torch.equal(found.ids_NT, torch.stack([blocks[at] for at in found.positions]))
    assert found.scored == (3,) * count == (3,) * len(found)


@pytest.mark.parametrize("source", [corpus(), DOCUMENTS, iter(DOCUMENTS)])
def test_a_corpus_and_its_documents_have_the_same_windows(source):
    found = cut(source, tokenizer=reader(), windows=5)
    expected = read_windows(corpus(), reader(), window=4, windows=5)
    assert torch.equal(found.ids_NT, expected.ids_NT)
    assert found.info.tokens_sha256 == expected.info.tokens_sha256


def test_a_tokenizer_written_in_python_reads_a_corpus_without_a_cache():
    class Plain:
        bos_token_id, eos_token_id = 0, 10

        def __call__(self, texts, **_):
            return {"input_ids": [[LETTERS.index(c) for c in text] for text in texts]}

        def __len__(self):
            return len(LETTERS)

    found = read_windows(corpus(), Plain(), window=4)
    assert torch.equal(found.ids_NT, read_windows(corpus(), reader(), window=4).ids_NT)


@pytest.mark.parametrize("bos", ["^", None])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_strides_score_each_token_once(stride, bos):
    tokenizer = reader(bos, "$" if bos else None)
    window, text = 4, stream() if bos else [t for t in stream() if t != 10]
    fresh = window - (bos is not None)
    found = read_windows(DOCUMENTS, tokenizer, window=window, windows=None, stride=stride)
    step = min(stride, fresh)
    whole = len(text) // fresh * fresh  # what is left after the last disjoint window is dropped
    assert len(found) == 1 + (whole - fresh) // step
    for row, position in zip(found.ids_NT.tolist(), found.positions, strict=True):
        assert row[window - fresh :] == text[position * step : position * step + fresh]
    scored = [t for row, n in zip(found.ids_NT, found.scored, strict=True) for t in row[-n:]]
    first = 0 if bos or stride == window else 1
    if bos or stride < window:
        assert scored == text[first : (len(found) - 1) * step + fresh]
    assert found.info.stride == stride
    assert found.info.tokens_scored == len(scored)
    few = read_windows(DOCUMENTS, tokenizer, window=window, windows=3, stride=stride)
    chosen = [i * len(found) // 3 for i in range(3)]
    assert torch.equal(few.ids_NT, found.ids_NT[chosen])
    assert few.scored == tuple(found.scored[i] for i in chosen)


@pytest.mark.parametrize("windows", [1, 3, 5, 99])
def test_held_out_windows_are_measured_and_calibrated_on_in_turn(windows):
    text = corpus()
    measured, calibration = held_out_windows(text, reader(), window=4, windows=windows)
    assert not set(measured.positions) & set(calibration.positions)
    assert 0 <= len(measured) - len(calibration) <= 1
    assert len(measured) <= windows
    total = len(token_blocks(text, reader(), 4))
    if total >= 2 * windows:
        assert measured.info == read_windows(text, reader(), window=4, windows=windows).info
    else:
        assert sorted(measured.positions + calibration.positions) == list(range(total))
    for each in (measured, calibration):
        assert (each.info.windows, each.info.tokens_scored) == (len(each), 3 * len(each))
        digest = hashlib.sha256(each.ids_NT.contiguous().numpy().tobytes()).hexdigest()
        assert each.info.tokens_sha256 == digest


def test_too_little_to_hold_out():
    with pytest.raises(UserError, match=r"'letters' split 'test' has less than 2 x 4 tokens"):
        held_out_windows(corpus(["abcd"]), reader(), window=4, windows=1)


@pytest.mark.parametrize("rows", [torch.arange(12).view(3, 4) % 10, [[1, 2, 3, 4], [5, 6, 7, 8]]])
def test_rows_are_windows_as_they_stand(rows):
    expected = torch.as_tensor(rows)[:2]
    for window in (None, 4):
        found = cut(rows, window=window, windows=2)
        assert torch.equal(found.ids_NT, expected)
        assert (found.info.choice, found.info.separator, found.info.bos) == ("given", None, None)


def test_windows_are_taken_as_they_are():
    found = read_windows(corpus(), reader(), window=4, windows=5)
    assert cut(found, window=None, windows=1) is found
    overlapping = read_windows(corpus(), reader(), window=4, stride=2)
    with pytest.raises(UserError, match=r"its windows overlap \(stride 2\)"):
        cut(overlapping)


def test_a_whole_file_is_one_document(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("a\n\nb " * 900)
    (text,) = whole_file(path).texts()
    assert text == path.read_text()
    with pytest.raises(UserError, match=r"absent.txt' does not exist"):
        whole_file(tmp_path / "absent.txt")


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("", {"tokenizer": reader()}, "the text has 0 tokens, which is less than one window of 4"),
        ("a", {"tokenizer": reader()}, "the text has 2 tokens, which is less than one window of 4"),
        (corpus(["a"]), {"tokenizer": reader()}, "'letters' split 'test' has 2 tokens, which"),
        ([], {}, "texts: there are none"),
        ("abcd", {}, "tokenizer: None cannot read text"),
        ("abcd", {"tokenizer": reader(), "vocab_size": 4}, "token .* outside the model's"),
        ([[1, 2], [1, 2, 3]], {"window": None}, "all must be"),
        ([[[1, 2]]], {"window": None}, "all must be"),
        ([1, 2, 3], {"window": None}, "all must be"),
        ([[1, 2, 3]], {}, "window: 4 is not the length of the given rows, 3 tokens"),
        ([[1]], {"window": None}, "rows of 1 tokens; a row needs at least 2"),
        ([[0.5, 1.5]], {"window": None}, "dtype torch.float32 is not an integer type"),
        ([[1, 11]], {"window": None}, "tokens: 11 is outside the model's vocabulary of 11"),
        ([[-1, 5]], {"window": None}, "tokens: -1 is outside"),
        ("abcd", {"window": 1}, "window: 1 is not a whole number of at least 2"),
        ("abcd", {"windows": 0}, "windows: 0 is not a whole number of at least 1"),
        ([[1, 2]], {"window": None, "source": {"corpora": "x"}}, "data: .*corpora"),
        ([[1, 2]], {"window": None, "source": {"split": 3}}, "data: split 3 is not a string"),
        (
            corpus(),
            {"tokenizer": reader(), "source": {"split": "x"}},
            "a corpus has its own",
        ),
    ],
)
def test_bad_input_is_named(texts, options, message):
    with pytest.raises(UserError, match=message):
        cut(texts, **options)


@pytest.mark.parametrize("stride", [0, 5])
def test_a_bad_stride_is_named(stride):
    with pytest.raises(UserError, match=f"stride: {stride} is"):
        read_windows("abcd", reader(), window=4, stride=stride)


def test_windows_of_a_named_corpus():
    found = read_windows(load_corpus("pydoc", "test"), reader(), window=64, windows=3)
    assert (found.info.corpus, found.info.split, len(found)) == ("pydoc", "test", 3)


def test_by_default_a_short_text_is_one_window(tmp_path):
    """BOS, the text and EOS; a text that is longer has windows of 512 tokens."""
    path = tmp_path / "text.txt"
    path.write_text("abc")
    for text in ("abc", ["abc", " "], whole_file(path)):
        found = read_windows(text, reader())
        assert found.ids_NT.tolist() == [[0, 1, 2, 3, 10]]
        assert cut(text, window=None, tokenizer=reader()).ids_NT.tolist() == found.ids_NT.tolist()
    assert read_windows("abc", reader(None, None)).ids_NT.tolist() == [[1, 2, 3]]
    for length, shape in ((509, (1, 511)), (510, (1, 512)), (511, (1, 512)), (1021, (2, 512))):
        assert read_windows("a" * length, reader()).ids_NT.shape == shape
    with pytest.raises(UserError, match=r"1 tokens, which is less than one window of 2"):
        read_windows("a", reader(None, None))
    with pytest.raises(UserError, match=r"5 tokens, which|4 tokens, which"):
        read_windows("abc", reader(), window=6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "text_file: file '.*text.txt' does not exist"),
        (b" ", "text_file: '.*text.txt' has no text"),
        (b"\xff\xfea\x00", "text_file: '.*text.txt' is UTF-16"),
        (b"\xe9", "text_file: '.*text.txt' line 1 is not valid UTF-8"),
        (b"abc", "text_file: '.*text.txt' has 4 tokens, which is less than one window of 9"),
    ],
)
def test_errors_of_a_whole_file_name_the_text(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{message}"):
        read_windows(whole_file(path), reader(), window=9)
