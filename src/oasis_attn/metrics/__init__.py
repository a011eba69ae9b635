"""The glossary: what every metric in a record means.

One name stands for one definition under one protocol.  What a paper defines has the paper's name
only where it is computed to the letter; every other metric has a name of its own.

A name may hold placeholders: `sink.rate@<eps>` defines `sink.rate@0.3` and `sink.rate@0.2`.
"""

from __future__ import annotations

from oasis_attn.errors import check_choice
from oasis_attn.metrics.benchmarks import BENCHMARKS
from oasis_attn.metrics.definition import Definition
from oasis_attn.metrics.diagnosis import DEPTH, JOINT, OUTLIERS, SINKS
from oasis_attn.metrics.runs import LANGUAGE, QUANTIZATION, STUDY_QUANTIZED, TASKS, TRAINING

__all__ = ["GLOSSARY", "SECTIONS", "Definition", "definitions"]

SECTIONS: dict[str, tuple[Definition, ...]] = {
    "Language modelling": LANGUAGE,
    "Outliers": OUTLIERS,
    "Attention sinks and the null": SINKS,
    "Depth routing": DEPTH,
    "Joint distribution over depth and positions": JOINT,
    "Tasks": TASKS,
    "Training and studies": TRAINING,
    "Quantisation and prefixes": QUANTIZATION,
    "Quantised models in a study": STUDY_QUANTIZED,
    "Benchmarks": BENCHMARKS,
}
"""The glossary by subject."""

GLOSSARY = tuple(each for section in SECTIONS.values() for each in section)


def definitions(name: str = "") -> list[Definition]:
    """What defines the metric `name`; failing that, all definitions whose names start with it.

    Raises:
        UserError: there is neither.
    """
    found = [each for each in GLOSSARY if each.name == name]
    found = found or [each for each in GLOSSARY if each.pattern.fullmatch(name)]
    found = found or [each for each in GLOSSARY if each.name.startswith(name)]
    if not found:
        check_choice("metric", name, [each.name for each in GLOSSARY])
    return found
