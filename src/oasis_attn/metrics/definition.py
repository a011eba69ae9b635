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
        name: name in records; may contain placeholders in angle brackets.
        definition: the formula, or a short description.
        unit: unit of the value.
        better: `lower`, `higher`, or empty if neither is better.
        protocol: the data it is measured on, and what its mean, maximum and `n` refer to.
        source: the paper and its equation, or `this library`.
        retired: only records of earlier versions contain it.
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
        """A pattern that matches the names of this definition."""
        parts = re.split(r"<(\w+)>", self.name)
        return re.compile(
            "".join(
                f"(?:{PLACEHOLDERS[part]})" if index % 2 else re.escape(part)
                for index, part in enumerate(parts)
            )
        )
