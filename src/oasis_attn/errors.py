"""The one error that is the user's to mend, and the checks that raise it."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Hashable
from itertools import islice
from typing import Any

MOST = 2**31 - 1
"""The largest count (steps, tokens, windows) that is accepted."""
_SHOWN = 40  # choices in a message
_SUGGESTED = 3  # of them, as "did you mean"
_LETTERS = 160  # of a value in a message


class UserError(ValueError):
    """Bad input: the message names the argument, its value and what is allowed.

    The command line prints it as one line and exits with code 2; every other exception is a bug of
    ours and keeps its traceback.
    """


def shown(value: object) -> str:
    """`repr(value)`, cut in the middle where it is long."""
    text = repr(value)
    half = _LETTERS // 2
    return text if len(text) <= _LETTERS else f"{text[:half]} ... {text[-half:]}"


def one_line(error: Exception) -> str:
    """What a foreign exception says, in one line, without a C++ stack trace."""
    said = str(error).partition("Exception raised from ")[0]
    return " ".join(said.split()) or type(error).__name__


def check_choice(argument: str, value: object, allowed: Collection[str]) -> None:
    """Raise `UserError` unless `value` is one of `allowed`, with the nearest matches.

    These are the names that begin with `value`, or else the most similar name.
    """
    if isinstance(value, Hashable) and value in allowed:
        return
    text = str(value)[:_LETTERS]
    near = [name for name in allowed if text and name.startswith(text)][:_SUGGESTED]
    near = near or difflib.get_close_matches(text, allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    names = ", ".join(str(each) for each in islice(allowed, _SHOWN))
    more = f", ... ({len(allowed)} in all)" if len(allowed) > _SHOWN else ""
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
        raise UserError(
            f"{argument}: {shown(value)} is not a whole number from {lowest} to {highest}"
        )


def check_seed(argument: str, value: object) -> None:
    """Raise `UserError` unless `value` can seed every generator that training uses."""
    check_whole(argument, value, 0, 2**32 - 1)


def check_flag(argument: str, value: object) -> None:
    """Raise `UserError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{argument}: {shown(value)} is neither true nor false")


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, with a ValueError for text that is nested too deeply as well."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
