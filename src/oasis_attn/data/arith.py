"""`arith`: word problems of one to three steps in the form of GSM8K, from a seeded generator.

    Question: Ann has 12 pens. She buys 5 more. Tom has 3 times as many pens as Ann. How many
    pens does Tom have?
    Answer: Ann now has <<12+5=17>>17 pens.
    Tom has <<17*3=51>>51 pens.
    #### 51

A problem expresses a calculation (12+5*3, evaluated from left to right) in words.  All numbers are
integers from 1 to 99.  No two splits share a calculation, because its hash decides which split may
use it.  So no test problem is a training problem in other words, although single steps may be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from operator import add, floordiv, mul, sub
from random import Random

COUNTS = {"train": 60_000, "validation": 1_200, "test": 1_200}
STEPS = (1, 2, 3)  # problems have these numbers of steps in turn
_SHARES = {"train": range(90), "validation": range(90, 95), "test": range(95, 100)}
_MOST = 99

_PEOPLE = {
    "Ann": "She", "Eva": "She", "Mia": "She", "Zoe": "She",
    "Ben": "He", "Leo": "He", "Sam": "He", "Tom": "He",
}  # fmt: skip
_THINGS = ("apples", "balls", "books", "cards", "coins", "pens", "shells", "stamps")
_APPLY = {"+": add, "-": sub, "*": mul, "/": floordiv}
_EVENTS = {
    "+": ("{she} buys {b} more.", "{she} finds {b} more.", "{other} gives {name} {b} more."),
    "-": ("{she} loses {b}.", "{she} sells {b}.", "{she} gives {b} to {other}."),
    "*": ("{other} has {b} times as many {things} as {name}.",),
    "/": ("{she} shares them equally among {b} friends.",),
}
_NOW = "How many {things} does {name} have now?"
_ASKED = {
    "+": _NOW,
    "-": _NOW,
    "*": "How many {things} does {other} have?",
    "/": "How many {things} does each friend get?",
}
_WORKED = {
    "+": "{name} now has {sum} {things}.",
    "-": "{name} now has {sum} {things}.",
    "*": "{other} has {sum} {things}.",
    "/": "Each friend gets {sum} {things}.",
}


class _Draws:
    """Random choices that use only `Random.random`: its sequence is the same in every Python."""

    def __init__(self, seed: int, split: str) -> None:
        digest = hashlib.sha256(f"arith {seed} {split}".encode()).digest()
        self._random = Random(int.from_bytes(digest, "big")).random

    def number(self, low: int, high: int) -> int:
        return low + int(self._random() * (high - low + 1))

    def one_of(self, items):
        return items[self.number(0, len(items) - 1)]


def arith_rows(split: str, seed: int = 0) -> Iterator[dict[str, str | int]]:
    """`COUNTS[split]` different rows with `question`, `answer` and `steps`.

    They are the same on every machine and with every version of Python.  The first step may be a
    product ("4 bags with 6 pens each").  A product after it, or a division, is the last step.
    """
    draws = _Draws(seed, split)
    seen: set[str] = set()
    while len(seen) < COUNTS[split]:
        steps = STEPS[len(seen) % len(STEPS)]
        start, moves = _expression(draws, steps)
        if _bucket(start, moves) in _SHARES[split]:
            question, answer = _story(draws, start, moves)
            if question not in seen:
                seen.add(question)
                yield {"question": question, "answer": answer, "steps": steps}


def _bucket(start: int, moves: list[tuple[str, int]]) -> int:
    """The hash of the calculation, from 0 to 99."""
    text = str(start) + "".join(f"{sign}{b}" for sign, b in moves)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100


def _expression(draws: _Draws, steps: int) -> tuple[int, list[tuple[str, int]]]:
    """A random calculation: its first number, and the sign and operand of each step."""
    while True:
        start = value = draws.number(2, 50)
        moves: list[tuple[str, int]] = []
        for step in range(steps):
            ends = step in (0, steps - 1)
            sign = draws.one_of("+-*/" if ends else "+-")
            b = draws.number(2, 9) if sign in "*/" else draws.number(1, 20)
            after = _APPLY[sign](value, b)
            whole = sign != "/" or (after * b == value and step == steps - 1)
            if not (whole and 1 <= after <= _MOST):
                break
            moves.append((sign, b))
            value = after
        else:
            return start, moves


def _story(draws: _Draws, start: int, moves: list[tuple[str, int]]) -> tuple[str, str]:
    name = draws.one_of(tuple(_PEOPLE))
    other = draws.one_of([person for person in _PEOPLE if person != name])
    words = {"name": name, "other": other, "she": _PEOPLE[name], "things": draws.one_of(_THINGS)}
    bags = moves[0][0] == "*" and (len(moves) > 1 or draws.number(0, 1) == 1)
    sentences = [f"{name} has {start} {words['things']}."]
    worked = []
    value = start
    for step, (sign, b) in enumerate(moves):
        if bags and step == 0:
            sentences = [f"{name} has {start} bags with {b} {words['things']} each."]
            line = _WORKED["+"]
        else:
            sentences.append(draws.one_of(_EVENTS[sign]).format(b=b, **words))
            line = _WORKED[sign]
        after = _APPLY[sign](value, b)
        worked.append(line.format(sum=f"<<{value}{sign}{b}={after}>>{after}", **words))
        value = after
    asked = _NOW if bags and len(moves) == 1 else _ASKED[moves[-1][0]]
    question = " ".join([*sentences, asked.format(**words)])
    return question, "\n".join([*worked, f"#### {value}"])
