"""The glossary: definitions of all metrics in records.

A name has one definition and one protocol.  A metric has the name that a paper uses only if it is
computed exactly as in the paper; all other metrics have names of their own.

A name can contain placeholders: `sink.rate@<eps>` defines `sink.rate@0.3` and `sink.rate@0.2`.
"""

from __future__ import annotations

import difflib

from oasis_attn.errors import UserError, shown
from oasis_attn.metrics.attention_only import ATTENTION_ONLY
from oasis_attn.metrics.benchmarks import BENCHMARKS
from oasis_attn.metrics.definition import Definition
from oasis_attn.metrics.diagnosis import DEPTH, JOINT, OUTLIERS, SINKS
from oasis_attn.metrics.lab import LAB
from oasis_attn.metrics.ranges import RANGES
from oasis_attn.metrics.runs import (
    CONVERSION,
    DOCTOR,
    LANGUAGE,
    QUANTIZATION,
    STUDY_QUANTIZED,
    TASKS,
    TRAINING,
)

__all__ = ["GLOSSARY", "SECTIONS", "Definition", "definitions"]

SECTIONS: dict[str, tuple[Definition, ...]] = {
    "Language modeling": LANGUAGE,
    "Outliers": OUTLIERS,
    "Ranges of 8 bits": RANGES,
    "Attention sinks and the null": SINKS,
    "Depth routing": DEPTH,
    "Joint distribution over depth and positions": JOINT,
    "Tasks": TASKS,
    "Training and studies": TRAINING,
    "Quantization and prefixes": QUANTIZATION,
    "Tries of the doctor": DOCTOR,
    "Conversion with a null from the sink": CONVERSION,
    "Quantized models in a study": STUDY_QUANTIZED,
    "Decoders on generated tasks": LAB,
    "Benchmarks": BENCHMARKS,
    "Attention-only models": ATTENTION_ONLY,
}
"""The definitions by topic."""

GLOSSARY = tuple(each for section in SECTIONS.values() for each in section)


def definitions(name: str = "") -> list[Definition]:
    """The definition of the metric `name`; if there is none, all whose names start with `name`.

    Raises:
        UserError: there is no such definition; the message names the nearest metric.
    """
    found = [each for each in GLOSSARY if each.name == name]
    found = found or [each for each in GLOSSARY if each.pattern.fullmatch(name)]
    found = found or [each for each in GLOSSARY if each.name.startswith(name)]
    if not found:
        names = difflib.get_close_matches(name, [each.name for each in GLOSSARY], cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, names))}?" if names else ";"
        raise UserError(f"metric: {shown(name)} is unknown{hint} `oasis metrics` lists all")
    return found
