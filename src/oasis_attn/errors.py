"""The one error that is the user's to mend, and the checks that raise it."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from itertools import islice

_SHOWN = 40  # choices in a message


class UserError(ValueError):
    """Bad input: the message names the argument, its value and what is allowed.

    The command line prints it as one line and exits with code 2; every other exception is a bug of
    ours and keeps its traceback.
    """


def check_choice(argument: str, value: object, allowed: Collection[str]) -> None:
    """Raise `UserError` unless `value` is one of `allowed`, naming the nearest match."""
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(str(each) for each in islice(allowed, _SHOWN))
    more = f", ... ({len(allowed)} in all)" if len(allowed) > _SHOWN else ""
    raise UserError(f"{argument}: {value!r} is not one of {shown}{more}{hint}")


def check_at_least(argument: str, value: float, lowest: float) -> None:
    """Raise `UserError` unless `value` is a number of at least `lowest`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= lowest:
        raise UserError(f"{argument}: {value!r} is not a number of at least {lowest}")


def check_seed(argument: str, value: int) -> None:
    """Raise `UserError` unless `value` can seed every generator that training uses."""
    if type(value) is not int or not 0 <= value < 2**32:
        raise UserError(f"{argument}: {value!r} is not a whole number from 0 to {2**32 - 1}")
