"""Cuts text into windows of tokens, by one protocol for everything that is measured.

1. Each document is tokenized as a text of its own and followed by EOS.
2. The tokens of all documents are cut into disjoint windows, each with BOS in front, unless a null
   of the model has the place of BOS.
3. The windows that are read are spread evenly over the text: of all N windows, window i of n is
   number floor(i N / n).

Why: models are trained on blocks of this form, here and in most pretraining, so the numbers
are of text as the model knows it; and the first windows alone are often about one topic.
`TextInfo` records the protocol with the numbers.

`loss.windowed` and `perplexity.windowed` are measured on such windows.  Windows that overlap (with
a stride below the window) give each token more context, and so a lower loss: those numbers have
their own names, `loss.strided` and `perplexity.strided`.

Axes: N windows, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from oasis_attn.data.blocks import Packing, count_tokens, pack_texts, token_blocks
from oasis_attn.data.corpora import Corpus
from oasis_attn.errors import (
    UserError,
    check_choice,
    check_iterable,
    check_type,
    check_unicode,
    check_whole,
    shown,
)
from oasis_attn.hub.tokenizer_prefix import check_no_prefix_in_tokenizer
from oasis_attn.records import TextInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW, WINDOWS = 512, 16
"""Default number of tokens in a window, and of windows."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of tokens, with the protocol that they were cut by.

    Attributes:
        ids_NT: token ids, int64.
        positions: the number of each window among all windows of the text, from 0.
        scored: how many tokens at the end of each window have a loss; T - 1 at most, because
            nothing is before the first token.
        info: the protocol, for records.
    """

    ids_NT: Tensor
    positions: tuple[int, ...]
    scored: tuple[int, ...]
    info: TextInfo

    def __len__(self) -> int:
        return len(self.ids_NT)


class HeldOut(NamedTuple):
    """Windows to measure on and windows to calibrate on, none in both."""

    measured: Windows
    calibration: Windows


def read_windows(
    texts: Corpus | str | Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int | None = None,
    windows: int | None = WINDOWS,
    stride: int | None = None,
    vocab_size: int | None = None,
    source: Mapping[str, str | None] | None = None,
) -> Windows:
    """Windows of a text by the protocol of this module.

    The whole text is tokenized once; the tokens of a corpus are cached.  With a `stride` below the
    window, each window but the first one of the text scores only its last `stride` tokens, so that
    each of them has at least window - stride - 1 tokens before it.

    Args:
        texts: a corpus, one document, or the documents.
        window: tokens in a window, BOS included; by default 512, or all tokens of a shorter text.
        windows: how many are read at most; None for all.
        stride: tokens from the start of a window to the start of the next; by default `window`,
            which means that windows are disjoint.
        vocab_size: of the model that reads the windows; by default, the tokenizer's.
        source: `corpus`, `split` and `sha256` for the record, of texts that are no `Corpus`.

    Raises:
        UserError: an argument that is out of range, no text, less text than one window, or a token
            outside the vocabulary.
    """
    if not isinstance(texts, Corpus):
        given = [texts] if isinstance(texts, str) else list(texts)
        for text in given:
            check_type("texts", text, str, "text")
            check_unicode("texts", text)
        texts = [text for text in given if text.strip()]
    if window is None:
        documents = texts.texts() if isinstance(texts, Corpus) else texts
        window = max(2, count_tokens(documents, tokenizer, WINDOW))
    check_whole("window", window, 2)
    if windows is not None:
        check_whole("windows", windows, 1)
    stride = window if stride is None else stride
    check_whole("stride", stride, 1)
    if stride > window:
        raise UserError(f"stride: {stride} is more than the window of {window}")
    tokens_NT, source = _all_tokens(texts, tokenizer, window, vocab_size, source)
    packing = Packing.of(tokenizer)
    fresh = packing.text_tokens(window)
    total = 1 + (len(tokens_NT) - 1) * fresh // min(stride, fresh)
    count = total if windows is None else min(windows, total)
    positions = [i * total // count for i in range(count)]
    return _take(tokens_NT, positions, packing, stride, source)


def held_out_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, window: int, windows: int
) -> HeldOut:
    """At most `windows` windows to measure on, and others, between them, to calibrate on.

    If the corpus has 2 x `windows` windows, those to measure on are the ones of `read_windows`.

    Raises:
        UserError: as `read_windows`, or less text than two windows.
    """
    both = read_windows(corpus, tokenizer, window=window, windows=2 * windows)
    if len(both) < 2:
        raise UserError(f"{corpus.label} has less than 2 x {window} tokens")
    return HeldOut(_every_other(both, 0), _every_other(both, 1))


def as_windows(
    texts_or_tokens: Windows | Corpus | str | Iterable[Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    window: int | None,
    windows: int,
    vocab_size: int,
    source: Mapping[str, str | None] | None = None,
) -> Windows:
    """Disjoint windows from what a caller has: windows, text, or rows of token ids.

    Args:
        texts_or_tokens: `Windows`, all of which are taken; text, as in `read_windows`; or rows of
            token ids, [N, T] or a sequence of [T], each a window.
        window: by default as in `read_windows` for text, and the length of the rows otherwise.
        windows: of a text, see `read_windows`; of rows, at most so many are taken, the first ones.
        vocab_size: of the model that reads the windows.

    Raises:
        UserError: as `read_windows`; rows of unequal length or of another length than `window`;
            token ids that are no integers in [0, vocab_size); windows that overlap.
    """
    found = texts_or_tokens
    if source is not None:
        check_type("data", source, Mapping, "a mapping with `corpus`, `split` and `sha256`")
    if not isinstance(found, Windows):
        check_whole("windows", windows, 1)
        if window is not None:
            check_whole("window", window, 2)
        items: Any = [found] if isinstance(found, str | Corpus) else found
        check_iterable("texts_or_tokens", items, "text or rows of tokens")
        first, items = _peek(items)
        if isinstance(first, str | Corpus):
            if tokenizer is None:
                raise UserError(
                    "tokenizer: None cannot read text; give the model's tokenizer, or tokens"
                )
            check_no_prefix_in_tokenizer(tokenizer)
            found = read_windows(
                first if isinstance(first, Corpus) else items,
                tokenizer,
                window=window,
                windows=windows,
                vocab_size=vocab_size,
                source=source,
            )
        else:
            found = _from_rows(items, window, windows, source)
    elif source:
        raise UserError("data: only for texts and rows of tokens; `Windows` have their own")
    if found.info.stride < found.info.window:
        raise UserError(
            f"texts_or_tokens: its windows overlap (stride {found.info.stride}); use disjoint ones"
        )
    low, high = int(found.ids_NT.min()), int(found.ids_NT.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"tokens: {low if low < 0 else high} is outside the model's vocabulary of {vocab_size}"
        )
    return found


def _peek(items: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    rest = iter(items)
    first = next(rest, None)
    if first is None:
        raise UserError("texts: there are none; at least one text or row of tokens is needed")
    return first, chain([first], rest)


def _all_tokens(
    texts: Corpus | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    vocab_size: int | None,
    source: Mapping[str, str | None] | None,
) -> tuple[np.ndarray, Mapping[str, str | None]]:
    """All disjoint windows of a text, [N, T], and where the text is from."""
    if not isinstance(texts, Corpus):
        return pack_texts(texts, tokenizer, window, vocab_size=vocab_size), source or {}
    if source:
        raise UserError("data: only for texts and rows of tokens; a corpus has its own")
    source = {"corpus": texts.name, "split": texts.split, "sha256": texts.sha256}
    if getattr(tokenizer, "backend_tokenizer", None) is None:  # which the cache needs
        return pack_texts(texts.texts(), tokenizer, window, vocab_size=vocab_size), source
    return token_blocks(texts, tokenizer, window, vocab_size=vocab_size).tokens_NT, source


def _take(
    tokens_NT: np.ndarray,
    positions: list[int],
    packing: Packing,
    stride: int,
    source: Mapping[str, str | None],
) -> Windows:
    """The windows at `positions`, out of the packed blocks of a text."""
    window = tokens_NT.shape[1]
    fresh = packing.text_tokens(window)
    begin = window - fresh  # tokens in front of the text: 1 or 0
    starts = np.array(positions)[:, None] * min(stride, fresh)
    at = starts + np.arange(fresh)  # in the tokens of the whole text
    ids_NT = np.full((len(positions), window), packing.bos or 0, np.int64)
    ids_NT[:, begin:] = tokens_NT[at // fresh, begin + at % fresh]
    later = window - 1 if stride == window else stride
    scored = tuple(window - 1 if position == 0 else later for position in positions)
    return _windows(
        torch.from_numpy(ids_NT),
        tuple(positions),
        scored,
        source,
        separator=packing.separator,
        bos=packing.bos,
        stride=stride,
        choice="spread",
    )


def _windows(
    ids_NT: Tensor,
    positions: tuple[int, ...],
    scored: tuple[int, ...],
    source: Mapping[str, str | None],
    **protocol: Any,
) -> Windows:
    for name, value in source.items():
        check_choice("data", name, ("corpus", "split", "sha256"))
        if not isinstance(value, str | None):
            raise UserError(f"data: {name} {shown(value)} is not a string")
    info = TextInfo(
        corpus=source.get("corpus"),
        split=source.get("split"),
        sha256=source.get("sha256"),
        window=ids_NT.shape[1],
        windows=len(ids_NT),
        tokens_scored=sum(scored),
        tokens_sha256=hashlib.sha256(ids_NT.contiguous().numpy().tobytes()).hexdigest(),
        **protocol,
    )
    return Windows(ids_NT=ids_NT, positions=positions, scored=scored, info=info)


def _every_other(both: Windows, start: int) -> Windows:
    info = both.info
    return _windows(
        both.ids_NT[start::2],
        both.positions[start::2],
        both.scored[start::2],
        {"corpus": info.corpus, "split": info.split, "sha256": info.sha256},
        separator=info.separator,
        bos=info.bos,
        stride=info.stride,
        choice=info.choice,
    )


def _from_rows(
    rows: Iterator[Any],
    window: int | None,
    windows: int,
    source: Mapping[str, str | None] | None,
) -> Windows:
    taken = [torch.as_tensor(row) for row in islice(rows, windows)]
    shapes = {tuple(row.shape) for row in taken}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise UserError(f"tokens: rows of shapes {sorted(shapes)}; all must be [T], of one length")
    ids_NT = torch.stack(taken)
    if ids_NT.dtype.is_floating_point or ids_NT.dtype in (torch.bool, torch.complex64):
        raise UserError(f"tokens: dtype {ids_NT.dtype} is not an integer type")
    count, length = ids_NT.shape
    if length < 2:
        raise UserError(f"tokens: rows of {length} tokens; a row needs at least 2")
    if window not in (None, length):
        raise UserError(f"window: {window} is not the length of the given rows, {length} tokens")
    first = int(ids_NT[0, 0])
    return _windows(
        ids_NT.long().cpu(),
        tuple(range(count)),
        (length - 1,) * count,
        source or {},
        separator=None,
        bos=first if bool((ids_NT[:, 0] == first).all()) else None,
        stride=length,
        choice="given",
    )
