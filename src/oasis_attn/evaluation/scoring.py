"""Scores answers: whether each is correct, Pass@k, and its interval."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

from oasis_attn.errors import UserError

Z95 = 1.959963984540054  # normal quantile of a two-sided 95 % interval

_MINUS = "-\N{MINUS SIGN}"  # in a class, a leading - is no range
# A sign belongs to the number only if no operand is before it.  Commas must separate three digits.
_NUMBER = rf"""
    [$€£]? (?P<sign> (?<![\w)%] ) [{_MINUS}+] )? [$€£]? [ ]?
    (?P<digits> (?> \d{{1,3}} (?: ,\d{{3}} )+ (?!\d) | \d+ ) (?: \.\d+ )? | (?<!\d) \.\d+ )
"""
_ANY = re.compile(_NUMBER, re.VERBOSE)
# The number must not go on as in `3/4`, `3 + 4`, `3:30`, `1.2.3`, `3,4` or `3e8`.
_GOES_ON = rf"[.,:]?\d | [ ]*[{_MINUS}+*/^\N{{MULTIPLICATION SIGN}}=][ ]*[$\d] | [eE][-+]?\d"
_MARKED = re.compile(rf"\#\#\#\# [ \t]* (?> {_NUMBER} ) (?! {_GOES_ON} )", re.VERBOSE)


class Score(NamedTuple):
    """Whether the number after `####` is correct (strict), and whether the last one is."""

    strict: bool
    flexible: bool


def score_answer(text: str, reference: str) -> Score:
    """Compare an answer in the form of GSM8K (Cobbe et al. 2021) with a reference solution.

    Strict: the number of the reference follows the first `####` in `text`.  Flexible: the last
    number in `text` is the one of the reference.  Numbers are compared by value, so `$1,234.00` is
    1234.  A unit may follow the number, but not the rest of an expression.

    Raises:
        UserError: `reference` has no number after `####`.
    """
    right = _marked(reference)
    if right is None:
        raise UserError(f"reference: {reference[-40:]!r} does not end in '#### N'")
    *_, last = (None, *_ANY.finditer(text))
    return Score(
        strict=_marked(text) == right,
        flexible=last is not None and _value(last) == right,
    )


def _marked(text: str) -> Decimal | None:
    match = _MARKED.match(text, start) if (start := text.find("####")) >= 0 else None
    return match and _value(match)


def _value(match: re.Match[str]) -> Decimal:
    value = Decimal(match["digits"].replace(",", ""))
    return -value if (match["sign"] or "+") in _MINUS else value


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of Pass@k from `right` of n samples (Chen et al. 2021, equation 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def ratio_of_sums(pairs: Sequence[tuple[float, float]]) -> tuple[float, float | None]:
    """sum(x) / sum(y) over pairs (x, y), and its standard error over the pairs.

    The error is that of a ratio estimate (Cochran 1977, section 6.4); None for a single pair.
    """
    n, total = len(pairs), math.fsum(y for _, y in pairs)
    ratio = math.fsum(x for x, _ in pairs) / total
    if n == 1:
        return ratio, None
    squares = math.fsum((x - ratio * y) ** 2 for x, y in pairs)
    return ratio, math.sqrt(squares * n / (n - 1)) / total


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n problems (Wilson 1927).

    For a mean of n values between 0 and 1 it may be too wide, but never too narrow.
    """
    z2 = Z95**2 / n
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)
