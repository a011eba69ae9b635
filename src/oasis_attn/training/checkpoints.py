"""Atomic checkpoints: a checkpoint is complete or does not exist.

A checkpoint is written to a staging folder, gets a manifest with its files and its run, and is then
renamed into place.  If a process is killed at any moment, the last complete checkpoint remains.
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
_MANIFEST = "complete.json"
_KEPT = 2


def publish(staged: Path, folder: Path, run: dict[str, Any]) -> None:
    """Write the manifest of `staged`, move it into `folder`, and remove all but the newest two."""
    sizes = {str(p.relative_to(staged)): p.stat().st_size for p in staged.rglob("*") if p.is_file()}
    write_text(staged / _MANIFEST, json.dumps({"run": run, "files": sizes}, indent=1))
    os.replace(staged, folder / staged.name)
    for old in _by_step(folder)[:-_KEPT]:
        # Rename first, so that a partly removed checkpoint is never in `folder`.
        os.replace(old, staged)
        shutil.rmtree(staged)


def last_checkpoint(folder: Path, run: dict[str, Any]) -> Path | None:
    """The newest checkpoint in `folder`; None if there is none.

    Raises:
        UserError: the checkpoint is damaged or belongs to another run.
    """
    found = _by_step(folder)
    if not found:
        return None
    path = found[-1]
    try:
        manifest = parse_json((path / _MANIFEST).read_text(encoding="utf-8"))
        sizes, found_run = dict(manifest["files"]), dict(manifest["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, _MANIFEST) from error
    for name, size in sizes.items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise _damaged(path, name)
    check_same_run(path, found_run, run)
    return path


def check_same_run(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise `UserError` that names the first difference between a run and the one to resume."""
    for name, value in json.loads(json.dumps(expected)).items():
        if name not in found or found[name] != value:
            raise UserError(
                f"resume: {str(path)!r} has {name} {shown(found.get(name))}, but this run has"
                f" {shown(value)}; repeat the options of the first run, or give a new folder"
            )


def _by_step(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit())
    return sorted(found, key=lambda path: int(path.name[11:]))


def _damaged(path: Path, name: str) -> UserError:
    return UserError(
        f"resume: checkpoint {str(path)!r} is damaged ({name}); remove it to resume from the"
        " previous one"
    )
