"""Token ids of text that is not tokenised as one string: they must be those of the whole text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from oasis_attn.errors import UserError

_BEFORE = ("a", "A", "1", ".")  # text to stand before a piece; tokenizers know one of them


def joined_ids(texts: Iterable[str], tokenizer: Any, enough: float = math.inf) -> list[int]:
    """Token ids of all documents, a blank line between them, without special tokens.

    Documents are tokenised one by one, so that no more of them is read than needed, each after the
    first as a piece of a longer text: a tokenizer that begins every text with a space ("\u2581"
    in Llama 2's vocabulary) does so at the first document only.

    Args:
        enough: no more text is read once there are so many tokens.
    """
    ids: list[int] = []
    for text in texts:
        ids += _inner_ids("\n\n" + text, tokenizer) if ids else _ids(text, tokenizer)
        if len(ids) >= enough:
            break
    return ids


def _inner_ids(piece: str, tokenizer: Any) -> list[int]:
    """The tokens that `piece` has after other text, where none of them reaches across."""
    for before in _BEFORE:
        front = _ids(before, tokenizer)
        whole = _ids(before + piece, tokenizer)
        if tokenizer.unk_token_id not in front and whole[: len(front)] == front:
            return whole[len(front) :]
    raise UserError(
        f"tokenizer: {type(tokenizer).__name__} knows none of {', '.join(map(repr, _BEFORE))} as"
        " tokens of their own, and cannot tell what a document's tokens are inside a text"
    )


def _ids(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Token ids with what the tokenizer itself puts before a text, once, and no end of text."""
    return _whole(prompt, tokenizer)["input_ids"]


def continuation_ids(prompt: str, text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens of `prompt + text` in two parts: what is given, and what is to be predicted.

    The second part begins with the first token that holds a character of `text`, or of the blanks
    before it: as in lm-eval, blanks at the end of a prompt count as the continuation's.  Where
    nothing stands before it, a BOS token does (EOS, if the tokenizer has none).

    Raises:
        UserError: `text` has no token, or it has nothing before it; a tokenizer without offsets.
    """
    whole = _whole(prompt + text, tokenizer, offsets=True)
    ids, border = whole["input_ids"], len(prompt.rstrip())
    starts = (at for at, (_, end) in enumerate(whole["offset_mapping"]) if end > border)
    start = next(starts, len(ids))
    given, predicted = ids[:start], ids[start:]
    if not predicted:
        raise UserError(f"continuation: {text!r} has no token of its own")
    if not given:
        first = tokenizer.bos_token_id
        first = tokenizer.eos_token_id if first is None else first
        if first is None:
            raise UserError("prompt: it is empty, and the tokenizer has no token to begin with")
        given = [first]
    return given, predicted


def _whole(text: str, tokenizer: Any, *, offsets: bool = False) -> dict[str, list[Any]]:
    """A text with the tokenizer's own beginning, without its end."""
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    options = {"return_offsets_mapping": True} if offsets else {}
    try:
        found = tokenizer(text, add_special_tokens=not begun, verbose=False, **options)
    except NotImplementedError as error:
        raise UserError(
            f"tokenizer: {type(tokenizer).__name__} has no fast form, which tells where its tokens"
            " are in a text"
        ) from error
    ended = len(found["input_ids"]) > 1 and found["input_ids"][-1] == tokenizer.eos_token_id
    return {name: found[name][: -1 if ended else None] for name in found}
