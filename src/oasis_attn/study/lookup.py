"""Finding plans and study folders by name, without heavy imports.

The command line calls these functions first, so that a wrong name is reported at once.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from oasis_attn.errors import UserError, check_choice, reason, shown

PLAN_FILE = "plan.yaml"


def shipped_plans() -> dict[str, str]:
    """The plans of the package: name -> YAML text."""
    return _shipped("plans")


def shipped_claims() -> dict[str, str]:
    """The files of claims and criteria of the package: name -> YAML text."""
    return _shipped("claims")


def _shipped(folder: str) -> dict[str, str]:
    texts = {
        Path(entry.name).stem: entry.read_text(encoding="utf-8")
        for entry in (files("oasis_attn.study") / folder).iterdir()
        if entry.name.endswith(".yaml")
    }
    return dict(sorted(texts.items()))


def read_plan(name_or_path: str | Path) -> str:
    """The YAML text of a plan of the package, by name, or of a file.

    Raises:
        UserError: there is no such plan, or the file cannot be read.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or os.path.isfile(path):
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"plan: {shown(name)} cannot be read ({reason(error)})") from error
    plans = shipped_plans()
    check_choice("plan (or a .yaml file)", name, plans)
    return plans[name]


def plan_path(folder: str | Path) -> Path:
    """The path of the plan in the folder of a study; `UserError` if there is none."""
    path = Path(folder) / PLAN_FILE
    if not os.path.isfile(path):
        raise UserError(
            f"study: {shown(str(folder))} contains no {PLAN_FILE}; start one with oasis study run"
        )
    return path
