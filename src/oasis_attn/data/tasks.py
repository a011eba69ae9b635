"""The generated tasks of decoders, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from oasis_attn.data.trigger import TriggerTask
from oasis_attn.data.trigger_words import TriggerWordsTask
from oasis_attn.errors import UserError, shown

Task = TriggerTask | TriggerWordsTask

TASKS: Mapping[str, str] = MappingProxyType(
    {
        "trigger": "one trigger in each sequence (arXiv 2603.11487)",
        "trigger-every": "each token is a trigger with probability 0.25",
        "trigger-content": "as trigger-every, with content in the first token; 48 coordinates",
        "trigger-words": "a language of 128 words and a trigger; the first token is a word",
    }
)
"""Names of tasks; `-LENGTH` may follow, as in `trigger-64`."""

_NAME = re.compile(rf"(?P<task>{'|'.join(TASKS)})(?:-(?P<length>[0-9]{{1,5}}))?")


def is_task(name: str) -> bool:
    """Whether `name` is the name of a task, and not of a corpus of text."""
    return _NAME.fullmatch(name) is not None


def task_by_name(name: str) -> Task:
    """The task with this name, such as `trigger`, `trigger-64` or `trigger-every-32`.

    Raises:
        UserError: the name is none of `TASKS`, or the length is not valid.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"task: {shown(name)} is none of {', '.join(TASKS)}, with or without -LENGTH"
        )
    length = int(match["length"] or 16)
    if match["task"] == "trigger-words":
        return TriggerWordsTask(length=length)
    if match["task"] == "trigger-content":
        return TriggerTask(length=length, width=48, rate=0.25, content=True)
    return TriggerTask(length=length, rate=0.25 if match["task"] == "trigger-every" else None)
