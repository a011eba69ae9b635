"""Plans as YAML 1.2 text."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from oasis_attn.errors import UserError, shown
from oasis_attn.study.lookup import read_plan
from oasis_attn.study.plan import Plan

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


def load_plan(name_or_path: str | Path) -> Plan:
    """Load a plan of the package by name, or a plan from a YAML file.

    Raises:
        UserError: there is no such plan or file, the file is not YAML, or the plan is invalid.
    """
    return parse_plan(read_plan(name_or_path), str(name_or_path))


def parse_plan(text: str, name: str) -> Plan:
    """Parse a plan from YAML; error messages refer to it as `name`."""
    try:
        given = yaml.load(text, _Loader)
    except RecursionError:
        raise UserError(f"plan: {shown(name)} is nested too deeply") from None
    # The constructors of YAML types raise Python errors for values such as `!!bool maybe`.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"plan: {shown(name)} is not YAML: {reason}") from error
    try:
        _check_size(given)
        return Plan.from_dict(given)
    except UserError as error:
        raise UserError(f"plan {shown(name)}: {error}") from error


def _check_size(given: Any) -> None:
    """Refuse deep nesting, and aliases that expand a short text to a huge plan."""
    level, count = [given], 0
    for _ in range(_MAX_DEPTH):
        count += len(level)
        if count > _MAX_VALUES:
            raise UserError(f"the plan has more than {_MAX_VALUES:,} values")
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
        raise UserError(f"the plan is nested more than {_MAX_DEPTH} levels deep")


def plan_text(plan: Plan) -> str:
    """The plan as YAML that `parse_plan` reads back."""
    return yaml.dump(plan.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
