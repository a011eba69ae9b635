"""Run one trial in this process: as a worker of a study, or to check a record."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from oasis_attn.errors import UserError
from oasis_attn.files import check_free
from oasis_attn.records import TrialRecord
from oasis_attn.study.plan_file import load_plan
from oasis_attn.study.storage import StudyFolder, rerun_command

if TYPE_CHECKING:
    from oasis_attn.study.trial import Reproduction

_ORPHANED = 3


def exit_with_parent() -> None:
    """Exit this process when standard input is closed, which happens when its parent ends."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(_ORPHANED)

    threading.Thread(target=wait, daemon=True).start()


def run_alone(
    where: str, trial_id: str, *, out: Path | None = None, check: Path | None = None
) -> tuple[TrialRecord, Reproduction | None]:
    """Run one trial in this process.

    Args:
        where: name or file of a plan, or the folder of a study.
        trial_id: id of the trial.
        out: path of the record; by default, its place in the folder of the study.
        check: a record to compare with, or the folder of a study that contains one.

    Returns:
        The record, and its comparison with `check`, if given.

    Raises:
        UserError: unknown plan or trial; `out` is missing or exists; the record of `check` cannot
            be read, belongs to another trial, or would be compared with itself.
    """
    expected = None if check is None else _record(check, trial_id)
    folder = StudyFolder.open(where) if os.path.isdir(where) else None
    if out is not None:
        check_free(out)
    elif folder is None:
        raise UserError(f"out: required, because {where!r} is a plan and not the folder of a study")
    plan = load_plan(where) if folder is None else folder.plan
    trial = plan.trial(trial_id)
    if expected is not None and expected.trial != trial.to_dict():
        raise UserError(f"check: {str(check)!r} is the record of another trial than {trial_id!r}")
    if out is None:
        assert folder is not None
        if check is not None and folder.has(trial):
            raise UserError("out: required with check, because the folder already has this record")
        record = folder.run(trial_id)
    else:
        plan.check([trial.variant])

        from oasis_attn.study.trial import run_trial  # imports torch

        work = out.with_name(f".{out.name}.work")
        record = run_trial(trial, out, work, command=rerun_command(plan, trial))
    if expected is None:
        return record, None

    from oasis_attn.study.trial import reproduction

    return record, reproduction(expected, record)


def _record(check: Path, trial_id: str) -> TrialRecord:
    if not check.is_dir():
        return TrialRecord.load(check)
    folder = StudyFolder.open(check)
    trial = folder.plan.trial(trial_id)
    if not folder.has(trial):
        raise UserError(f"check: {str(check)!r} contains no record of {trial_id!r}")
    return folder.records()[trial]
