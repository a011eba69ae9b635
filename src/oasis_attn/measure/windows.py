"""Text or tokens in, windows of equal length out.  Axes: N windows, T tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from oasis_attn.data.tokens import joined_ids
from oasis_attn.errors import UserError, check_whole

TEXT_WINDOW = 512


def cut_windows(
    texts_or_tokens: str | Iterable[Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    window: int | None,
    windows: int,
    vocabulary: int,
) -> Tensor:
    """Disjoint windows, ids_NT int64, at most `windows` of them.

    A text is cut every `window` tokens (512 by default), documents joined by a blank line and the
    remainder dropped; a tokenizer with a BOS token spends each window's first place on it.  Rows of
    tokens, a [N, T] tensor or a sequence of T-long rows, are windows as they stand.

    Raises:
        UserError: no text, text shorter than a window, rows of unequal length or of another
            length than `window`, tokens that are no integers in [0, vocabulary).
    """
    check_whole("windows", windows, 1)
    if window is not None:
        check_whole("window", window, 2)
    items = iter([texts_or_tokens] if isinstance(texts_or_tokens, str) else texts_or_tokens)
    first = next(items, None)
    if first is None:
        raise UserError("texts: there is nothing to read; give at least one text or row of tokens")
    items = chain([first], items)
    if isinstance(first, str):
        ids_NT = _from_texts(items, tokenizer, window or TEXT_WINDOW, windows)
    else:
        ids_NT = _from_rows(items, window, windows)
    low, high = int(ids_NT.min()), int(ids_NT.max())
    if low < 0 or high >= vocabulary:
        raise UserError(
            f"tokens: {low if low < 0 else high} is outside the model's vocabulary of {vocabulary}"
        )
    return ids_NT


def _from_texts(
    texts: Iterator[str],
    tokenizer: PreTrainedTokenizerBase | None,
    window: int,
    windows: int,
) -> Tensor:
    if tokenizer is None:
        raise UserError("tokenizer: None cannot read text; give the model's tokenizer, or tokens")
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    fresh = window - len(prefix)
    ids = joined_ids(texts, tokenizer, fresh * windows)
    count = min(windows, len(ids) // fresh)
    if count == 0:
        raise UserError(
            f"texts: {len(ids)} tokens are fewer than one window of {window}; "
            "give more text or a smaller window"
        )
    return torch.tensor([prefix + ids[i * fresh : (i + 1) * fresh] for i in range(count)])


def _from_rows(rows: Iterator[Any], window: int | None, windows: int) -> Tensor:
    taken = [torch.as_tensor(row) for row in islice(rows, windows)]
    shapes = {tuple(row.shape) for row in taken}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise UserError(f"tokens: rows of shapes {sorted(shapes)}; all must be [T], of one length")
    ids_NT = torch.stack(taken)
    if ids_NT.dtype.is_floating_point or ids_NT.dtype in (torch.bool, torch.complex64):
        raise UserError(f"tokens: dtype {ids_NT.dtype} is not an integer type")
    length = ids_NT.shape[1]
    if length < 2 or window not in (None, length):
        raise UserError(f"tokens: rows of {length} tokens; allowed are {window or 'at least 2'}")
    return ids_NT.long().cpu()
