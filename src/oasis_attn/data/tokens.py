"""Token ids of prompts and continuations, as they are in the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oasis_attn.errors import UserError


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Token ids of a prompt: special tokens that the tokenizer puts in front once, and no EOS."""
    return _whole(prompt, tokenizer)["input_ids"]


def continuation_ids(prompt: str, text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens of `prompt + text` in two parts: those given, and those to predict.

    The second part begins with the first token that has a character of `text`.  As in lm-eval,
    blanks at the end of the prompt belong to the continuation.  If the first part would be empty,
    it is BOS, or EOS for a tokenizer without BOS.

    Raises:
        UserError: `text` has no token; the first part would be empty and the tokenizer has neither
            BOS nor EOS; or the tokenizer does not give the positions of its tokens.
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
            raise UserError("prompt: it is empty, and the tokenizer has neither BOS nor EOS")
        given = [first]
    return given, predicted


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The part of the text that each token adds; together they are the whole text.

    Several tokens can make one character; then the last of them has it, and the others are empty.
    """

    def text(start: int, end: int) -> str:
        return tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False)

    # What a token adds depends on the token before it: some tokenizers drop the first blank.
    texts, start, done = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, now = text(start, done), text(start, end)
        if now.endswith("\ufffd") and end < len(ids):
            texts.append("")
        else:
            texts.append(now[len(before) :])
            start, done = done, end
    return texts


def _whole(text: str, tokenizer: Any, *, offsets: bool = False) -> dict[str, list[Any]]:
    """A text with the special tokens that the tokenizer puts in front, once, but not with EOS."""
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    options = {"return_offsets_mapping": True} if offsets else {}
    try:
        found = tokenizer(text, add_special_tokens=not begun, verbose=False, **options)
    except NotImplementedError as error:
        raise UserError(
            f"tokenizer: {type(tokenizer).__name__} has no fast form, which gives the positions of"
            " its tokens in a text"
        ) from error
    ended = len(found["input_ids"]) > 1 and found["input_ids"][-1] == tokenizer.eos_token_id
    return {name: found[name][: -1 if ended else None] for name in found}
