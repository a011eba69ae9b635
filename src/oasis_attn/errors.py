"""`UserError`, the error for invalid input, and the checks that raise it."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Collection, Hashable, Mapping
from itertools import islice
from os import PathLike
from typing import Any

MOST = 2**31 - 1
"""The largest allowed count (steps, tokens, windows)."""
_SHOWN = 40  # maximum number of choices in a message
_SUGGESTED = 3  # maximum number of suggestions after "did you mean"
_LETTERS = 160  # maximum length of a value in a message


class UserError(ValueError):
    """Invalid input: the message names the argument, its value and the allowed values.

    The command line prints it as one line and exits with code 2.  Every other exception is a bug in
    this library and keeps its traceback.
    """


class Refusal(UserError):
    """A format cannot hold a model.

    Attributes:
        reason: why, in words that follow "it cannot hold the model:".
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def shown(value: object) -> str:
    """`repr(value)` in one line, shortened in the middle if it is long."""
    text = re.sub(r"\n\s*", " ", repr(value))
    half = _LETTERS // 2
    return text if len(text) <= _LETTERS else f"{text[:half]} ... {text[-half:]}"


def message_of(error: BaseException) -> str:
    """`str(error)`, also for an exception of a user that cannot be turned into text."""
    try:
        return str(error)
    except Exception as failure:
        return f"its message cannot be shown ({type(failure).__name__})"


def one_line(error: Exception) -> str:
    """The message of another library's exception in one line, without a C++ stack trace."""
    message = message_of(error).partition("Exception raised from ")[0]
    return " ".join(message.split()) or type(error).__name__


def reason(error: Exception) -> str:
    """Why a file cannot be read or written, without its path, which the caller's message names."""
    return (isinstance(error, OSError) and error.strerror) or one_line(error)


def nearest(
    value: object, allowed: Collection[str], synonyms: Mapping[str, str] | None = None
) -> list[str]:
    """The allowed names that may be meant.

    These are the synonym of `value`, the names that begin with it, or else the most similar name.
    """
    text = str(value)[:_LETTERS]
    synonym = (synonyms or {}).get(text)
    if synonym is not None and synonym in allowed:
        return [synonym]
    begin = [name for name in allowed if text and name.startswith(text)][:_SUGGESTED]
    return begin or difflib.get_close_matches(text, allowed, n=1, cutoff=0.5)


def check_choice(
    argument: str,
    value: object,
    allowed: Collection[str],
    synonyms: Mapping[str, str] | None = None,
) -> None:
    """Raise `UserError` unless `value` is in `allowed`; the message names the nearest matches.

    Args:
        synonyms: other names -> names in `allowed`, for the message.
    """
    if isinstance(value, Hashable) and value in allowed:
        return
    near = nearest(value, allowed, synonyms)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    names = ", ".join(str(each) for each in islice(allowed, _SHOWN))
    more = f", ... ({len(allowed)} in total)" if len(allowed) > _SHOWN else ""
    raise UserError(f"{argument}: {shown(value)} is not one of {names}{more}{hint}")


def check_at_least(argument: str, value: object, lowest: float, highest: float = math.inf) -> None:
    """Raise `UserError` unless `value` is a finite number from `lowest` to `highest`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and lowest <= value <= highest and value != math.inf):  # type: ignore[operator]
        least, most = f"{lowest:g}", f"{highest:g}"
        ends = f"of at least {least}" if highest == math.inf else f"from {least} to {most}"
        raise UserError(f"{argument}: {shown(value)} is not a number {ends}")


def check_whole(argument: str, value: object, lowest: int, highest: int = MOST) -> None:
    """Raise `UserError` unless `value` is an int from `lowest` to `highest`."""
    if type(value) is not int or not lowest <= value <= highest:
        open_ended = highest == MOST and not (type(value) is int and value > highest)
        ends = f"of at least {lowest}" if open_ended else f"from {lowest} to {highest}"
        raise UserError(f"{argument}: {shown(value)} is not a whole number {ends}")


def check_seed(argument: str, value: object) -> None:
    """Raise `UserError` unless `value` is a valid random seed (an int from 0 to 2^32 - 1)."""
    check_whole(argument, value, 0, 2**32 - 1)


def check_flag(argument: str, value: object) -> None:
    """Raise `UserError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{argument}: {shown(value)} is neither true nor false")


def check_type(argument: str, value: object, kind: Any, what: str) -> None:
    """Raise `UserError` unless `value` is an instance of `kind`, which the message calls `what`."""
    if not isinstance(value, kind):
        raise UserError(f"{argument}: {shown(value)} is not {what}")


def check_iterable(argument: str, value: object, what: str) -> None:
    """Raise `UserError` unless `value` can be iterated over; the message calls it `what`."""
    try:
        iter(value)  # type: ignore[call-overload]
    except TypeError as error:  # also of a tensor without axes
        raise UserError(f"{argument}: {shown(value)} is not {what}") from error


def check_path(argument: str, value: object) -> None:
    """Raise `UserError` unless `value` can be the name of a file or folder."""
    check_type(argument, value, str | PathLike, "a name or a path")
    try:
        possible = b"\0" not in os.fsencode(value)  # type: ignore[arg-type]
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise UserError(f"{argument}: {shown(value)} has a character that no file name can have")


def check_tokenizer(tokenizer: object) -> None:
    """Raise `UserError` unless `tokenizer` is one of transformers."""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise UserError(f"tokenizer: {shown(tokenizer)} is not a tokenizer of transformers")


def check_loaded(model: object) -> None:
    """Raise `UserError` unless `model` is a model of transformers, and not a name or compiled."""
    if isinstance(model, str | PathLike):
        raise UserError(
            f"model: {shown(str(model))} is a name; give a model, such as the one that `load_model`"
            " of oasis_attn.hub.loading returns with its tokenizer"
        )
    if type(model).__name__ == "OptimizedModule":
        raise UserError("model: it is a result of torch.compile; give the model that was compiled")
    if not (hasattr(model, "config") and hasattr(model, "named_modules")):
        raise UserError(f"model: {shown(model)} is not a model of transformers")


def check_unicode(argument: str, text: str) -> None:
    """Raise `UserError` if `text` has half of a surrogate pair, which has no UTF-8 form.

    Python reads bytes of the command line that are not UTF-8 as such characters.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{argument}: character {error.start} is not Unicode") from error


def parse_json(text: str | bytes) -> Any:
    """`json.loads` that raises ValueError also for text that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
