"""Checkpoints that are whole or not there.

A checkpoint is written in a staging folder, sealed with a list of its files and of what run it
belongs to, and renamed into place.  A process killed at any moment leaves the last whole one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from oasis_attn.errors import UserError, parse_json, shown
from oasis_attn.files import write_text

STAGING = ".staged"
_SEAL = "complete.json"
_KEPT = 2


def publish(staged: Path, folder: Path, run: dict[str, Any]) -> None:
    """Seal `staged`, move it into `folder` under its own name, and keep the newest two there."""
    sizes = {str(p.relative_to(staged)): p.stat().st_size for p in staged.rglob("*") if p.is_file()}
    write_text(staged / _SEAL, json.dumps({"run": run, "files": sizes}, indent=1))
    os.replace(staged, folder / staged.name)
    for old in _by_step(folder)[:-_KEPT]:
        # Out of the way in one move first: a half-removed checkpoint is not seen either.
        os.replace(old, staged)
        shutil.rmtree(staged)


def last_checkpoint(folder: Path, run: dict[str, Any]) -> Path | None:
    """The newest checkpoint in `folder`, if any.

    Raises:
        UserError: it is damaged, or belongs to another run.
    """
    found = _by_step(folder)
    if not found:
        return None
    path = found[-1]
    try:
        seal = parse_json((path / _SEAL).read_text(encoding="utf-8"))
        sizes, sealed_run = dict(seal["files"]), dict(seal["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, _SEAL) from error
    for name, size in sizes.items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise _damaged(path, name)
    check_same_run(path, sealed_run, run)
    return path


def check_same_run(path: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise `UserError` naming the first setting in which a run to go on with differs."""
    for name, value in json.loads(json.dumps(asked)).items():
        if name not in found or found[name] != value:
            raise UserError(
                f"resume: {str(path)!r} has {name} {shown(found.get(name))}, and this run"
                f" {shown(value)}"
            )


def _by_step(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit())
    return sorted(found, key=lambda path: int(path.name[11:]))


def _damaged(path: Path, name: str) -> UserError:
    return UserError(
        f"resume: checkpoint {str(path)!r} is damaged ({name}); remove it to go on from the one "
        "before"
    )
