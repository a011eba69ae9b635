"""Strict reading of JSON or YAML values: every wrong value is one clear `UserError`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from oasis_attn.errors import UserError, check_choice, shown

_KINDS = {int: "a whole number", str: "text"}


def read_mapping(argument: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The items of a mapping; a list of names stands for a mapping of each name to None."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = dict.fromkeys(read_list(argument, value, str))
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{argument}: {shown(value)} is not a mapping of names to values")
    return iter(value.items())


def read_list(argument: str, value: Any, kind: type | None = None) -> tuple[Any, ...]:
    """The items of a list, all of the type `kind` if it is given."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"{argument}: {shown(value)} is not a list")
    for item in value:
        if kind and (not isinstance(item, kind) or isinstance(item, bool)):
            raise UserError(f"{argument}: {shown(item)} is not {_KINDS[kind]}")
    return tuple(value)


def read_fields(
    argument: str, value: Any, allowed: Collection[str], required: Collection[str]
) -> dict[str, Any]:
    """The fields of a mapping; none is unknown, and no required one is missing."""
    if not isinstance(value, Mapping):
        raise UserError(f"{argument}: {shown(value)} is not a mapping of fields to values")
    for name in value:
        check_choice(argument, name, allowed)
    if missing := [repr(name) for name in required if name not in value]:
        are = "field {} is" if len(missing) == 1 else "fields {} are"
        raise UserError(f"{argument}: {are.format(', '.join(missing))} missing")
    return dict(value)


def read_text(argument: str, value: Any) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{argument}: {shown(value)} is not text")
    return value
