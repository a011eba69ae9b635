"""YAML 1.2 text for plans and files of claims: strict reading, and writing."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from oasis_attn.errors import UserError, shown

_MAX_DEPTH = 8  # nesting of lists and mappings
_MAX_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: `off` is a string, `4e-3` a number; duplicate keys are errors."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key that is not a scalar", key.start_mark
                )
            if key.value in seen:
                mark = key.start_mark
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key.value!r}", mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that YAML 1.1 or 1.2 would read as another type."""


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^{_pattern}$"), _first
        )


def parse_yaml(text: str, kind: str, name: str) -> Any:
    """The value of a YAML text; error messages call it the `kind` (such as "plan") `name`.

    Raises:
        UserError: the text is not YAML, is nested too deeply, or expands to too many values.
    """
    try:
        value = yaml.load(text, _Loader)
    except RecursionError:
        raise UserError(f"{kind}: {shown(name)} is nested too deeply") from None
    # The constructors of YAML types raise Python errors for values such as `!!bool maybe`.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{kind}: {shown(name)} is not YAML: {reason}") from error
    _check_size(value, kind, name)
    return value


def yaml_text(value: Any) -> str:
    """The value as YAML that `parse_yaml` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _check_size(given: Any, kind: str, name: str) -> None:
    """Refuse deep nesting, and aliases that expand a short text to a huge value."""
    level, count = [given], 0
    for _ in range(_MAX_DEPTH):
        count += len(level)
        if count > _MAX_VALUES:
            raise UserError(f"{kind} {shown(name)}: it has more than {_MAX_VALUES:,} values")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            if len(inner) > _MAX_VALUES:
                break
        level = inner
    if level:
        raise UserError(f"{kind} {shown(name)}: it is nested more than {_MAX_DEPTH} levels deep")
