"""One cell in a process of its own: a worker of a study, or a rerun of a record."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from oasis_attn.errors import UserError
from oasis_attn.files import check_free
from oasis_attn.records import TrialRecord
from oasis_attn.study.cell import differences, run_cell
from oasis_attn.study.folder import StudyFolder, reproduce
from oasis_attn.study.plan_file import load_plan

_ORPHANED = 3


def tie() -> None:
    """End this process as soon as standard input is closed: when its parent has ended."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(_ORPHANED)

    threading.Thread(target=wait, daemon=True).start()


def run_alone(
    where: str, cell_id: str, *, out: Path | None = None, check: Path | None = None
) -> tuple[TrialRecord, list[str]]:
    """Run one cell here; its record, and what in it differs from the record `check`.

    Args:
        where: a plan's name or file, or a study's folder.
        cell_id: which of its cells.
        out: the record to write; default, the folder's own.
        check: a record to compare with, or the folder of a study that has one.

    Raises:
        UserError: unknown plan or cell, `out` missing or taken, a record that cannot be read, or
            that would be compared with itself.
    """
    before = None if check is None else _record(check, cell_id)
    if out is None:
        if not os.path.isdir(where):
            raise UserError(
                f"out: {where!r} is a plan, which has no place for the record; give one"
            )
        folder = StudyFolder.open(where)
        if check is not None and folder.has(folder.plan.cell(cell_id)):
            raise UserError("out: it is needed with check, for the folder has this record already")
        record = folder.run(cell_id)
    else:
        check_free(out)
        plan = StudyFolder.open(where).plan if os.path.isdir(where) else load_plan(where)
        cell = plan.cell(cell_id)
        work = out.with_name(f".{out.name}.work")
        record = run_cell(cell, out, work, command=reproduce(plan, cell))
    return record, [] if before is None else differences(before, record)


def _record(check: Path, cell_id: str) -> TrialRecord:
    if not check.is_dir():
        return TrialRecord.load(check)
    folder = StudyFolder.open(check)
    cell = folder.plan.cell(cell_id)
    if not folder.has(cell):
        raise UserError(f"check: {str(check)!r} has no record of {cell_id!r}")
    return folder.records()[cell]
