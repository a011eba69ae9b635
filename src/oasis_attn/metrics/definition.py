"""One entry of the glossary."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

PLACEHOLDERS = {
    "eps": r"[\d.]+",
    "rule": r"L-15|L/2",
    "part": r"leakage|concentration|neg_entropy",
    "task": r"arith|gsm8k",
    "k": r"\d+",
    "score": r"strict|flexible",
    "filter": r"strict-match|flexible-extract",
    "scheme": r"[a-z0-9][a-z0-9_-]*",
    "model": r"[a-z0-9_]+",
    "other": r"vanilla|authors",
    "length": r"\d+",
    "case": r"load|convert",
}


@dataclass(frozen=True, kw_only=True)
class Definition:
    """The definition of one metric, or of one family of metrics.

    Attributes:
        name: the name in records; it can contain placeholders in angle brackets.
        definition: a formula, or a description in words.
        unit: unit of the value.
        better: `lower`, `higher`, or empty if neither is better.
        protocol: what it is measured on, and what the mean, the maximum and `n` are over.
        source: the paper and its number, or `this library`.
        retired: True if only records of earlier versions contain it.
    """

    name: str
    definition: str
    unit: str
    better: str = ""
    protocol: str
    source: str = "this library"
    retired: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """A regular expression for the metric names that this definition covers."""
        parts = re.split(r"<(\w+)>", self.name)
        return re.compile(
            "".join(
                f"(?:{PLACEHOLDERS[part]})" if index % 2 else re.escape(part)
                for index, part in enumerate(parts)
            )
        )
