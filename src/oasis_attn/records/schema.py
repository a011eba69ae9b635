"""Convert values to JSON and back; dataclasses are the schema, and other fields are errors."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from oasis_attn.errors import shown

OPTIONAL = {"optional": True}
"""Metadata of a dataclass field that is absent from JSON where it is empty."""


def encode(value: Any) -> Any:
    """`value` as JSON values; a number that is not finite becomes a string."""
    if is_dataclass(value) and not isinstance(value, type):
        empty = {name for name in _optional(type(value)) if not getattr(value, name)}
        names = (each.name for each in fields(value) if each.name not in empty)
        return {name: encode(getattr(value, name)) for name in names}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


@cache
def _optional(kind: type) -> frozenset[str]:
    """Names of the fields of a dataclass that may be absent."""
    return frozenset(each.name for each in fields(kind) if each.metadata.get("optional"))


@cache
def _schema(kind: type) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    hints = get_type_hints(kind)
    return {each.name: hints[each.name] for each in fields(kind)}


def decode(expected: Any, found: Any, key: str) -> Any:
    """The value that JSON holds as `found`, of the type `expected`.

    Raises:
        ValueError: it is of another type; the message names its place in the record, `key`.
    """
    arguments = get_args(expected)
    match get_origin(expected):
        case _ if expected is Any:
            return found
        case _ if isinstance(expected, type) and is_dataclass(expected):
            schema = _schema(expected)
            _check_type(dict, found, key)
            different = (found.keys() ^ schema.keys()) - _optional(expected)
            if different:
                wrong = min(different)
                problem = "missing" if wrong in schema else "unknown"
                names = ", ".join(schema)
                raise ValueError(f"{key}: key {shown(wrong)} is {problem}; allowed are {names}")
            return expected(**{n: decode(schema[n], x, f"{key}.{n}") for n, x in found.items()})
        case origin if origin is UnionType:
            (other,) = (each for each in arguments if each is not NoneType)
            return None if found is None else decode(other, found, key)
        case origin if origin is dict:
            _check_type(dict, found, key)
            return {n: decode(arguments[1], x, f"{key}.{n}") for n, x in found.items()}
        case origin if origin is tuple:
            _check_type(list, found, key)
            types = arguments if arguments[1] is not Ellipsis else arguments[:1] * len(found)
            if len(found) != len(types):
                raise ValueError(f"{key}: {shown(found)} is not of length {len(types)}")
            pairs = enumerate(zip(types, found, strict=True))
            return tuple(decode(type_, x, f"{key}[{n}]") for n, (type_, x) in pairs)
    if expected is float and (type(found) is int or found in ("nan", "inf", "-inf")):
        return float(found)
    _check_type(expected, found, key)
    return found


def _check_type(expected: type, found: object, key: str) -> None:
    if type(found) is not expected:
        raise ValueError(f"{key}: {shown(found)} is not of type {expected.__name__}")
