"""Plans as YAML 1.2 text."""

from __future__ import annotations

from pathlib import Path

from oasis_attn.errors import UserError, shown
from oasis_attn.study.lookup import read_plan
from oasis_attn.study.plan import Plan
from oasis_attn.study.yaml_text import parse_yaml, yaml_text


def load_plan(name_or_path: str | Path) -> Plan:
    """Load a plan of the package by name, or a plan from a YAML file.

    Raises:
        UserError: there is no such plan or file, the file is not YAML, or the plan is invalid.
    """
    return parse_plan(read_plan(name_or_path), str(name_or_path))


def parse_plan(text: str, name: str) -> Plan:
    """Parse a plan from YAML; error messages refer to it as `name`."""
    given = parse_yaml(text, "plan", name)
    try:
        return Plan.from_dict(given)
    except UserError as error:
        raise UserError(f"plan {shown(name)}: {error}") from error


def plan_text(plan: Plan) -> str:
    """The plan as YAML that `parse_plan` reads back."""
    return yaml_text(plan.to_dict())
