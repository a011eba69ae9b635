"""Plans on disk: YAML 1.2, and the plans that come with the package."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from oasis_attn.errors import UserError, check_choice, shown
from oasis_attn.study.plan import Plan

_DEEPEST = 8  # a plan's lists and mappings within each other
_MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: `off` is a word, `4e-3` a number; a key given twice is an error."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key that is no word", key.start_mark
                )
            if key.value in seen:
                mark = key.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} twice", mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would take for something else."""


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


def shipped_plans() -> dict[str, str]:
    """The plans that come with the package: name -> YAML."""
    folder = files("oasis_attn.study") / "plans"
    texts = {
        Path(entry.name).stem: entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }
    return dict(sorted(texts.items()))


def load_plan(name_or_path: str | Path) -> Plan:
    """A plan by its name among the shipped ones, or from a YAML file.

    Raises:
        UserError: neither; a file that is not YAML; a plan that could not be run.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or os.path.isfile(path):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"plan: {shown(name)} cannot be read ({error})") from error
    else:
        check_choice("plan (or a .yaml file)", name, shipped_plans())
        text = shipped_plans()[name]
    return parse_plan(text, name)


def parse_plan(text: str, name: str) -> Plan:
    """The plan that `text` holds; errors call it `name`."""
    try:
        given = yaml.load(text, _Loader)
    except RecursionError:
        raise UserError(f"plan: {shown(name)} is nested too deeply") from None
    # The constructors of YAML's types raise what Python does on a value such as `!!bool maybe`.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"plan: {shown(name)} is not YAML: {reason}") from error
    try:
        _check_size(given)
        return Plan.from_dict(given)
    except UserError as error:
        raise UserError(f"plan {shown(name)}: {error}") from error


def _check_size(given: Any) -> None:
    """Refuse nesting that no plan needs, and aliases that make little text a huge plan."""
    level, count = [given], 0
    for _ in range(_DEEPEST):
        count += len(level)
        if count > _MOST_VALUES:
            raise UserError(f"it has more than {_MOST_VALUES:,} values")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            if len(inner) > _MOST_VALUES:
                break
        level = inner
    if level:
        raise UserError(f"it is nested more than {_DEEPEST} deep")


def plan_text(plan: Plan) -> str:
    """The plan as YAML that `parse_plan` reads back."""
    return yaml.dump(plan.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
