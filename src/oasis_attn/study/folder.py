"""A study's folder: its plan, and one record per finished cell.

OUT/plan.yaml          what was asked for; nothing else may go on here
OUT/cells/<id>.json    the record of each finished cell, whole or not there
OUT/trials.jsonl       of a published study, in place of cells/: one compact record a line
OUT/failed/<id>.log    what a cell that ended badly said; removed when it is tried again
OUT/work/              of cells that are not finished; may be removed while none runs
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median

from oasis_attn.errors import UserError, shown
from oasis_attn.files import check_free, is_locked, write_text
from oasis_attn.records import TrialRecord
from oasis_attn.study.cell import TIMES, run_cell
from oasis_attn.study.plan import Cell, Plan
from oasis_attn.study.plan_file import load_plan, parse_plan, plan_text, shipped_plans

TRIALS = "trials.jsonl"
KEPT_TABLES = ("null.mass",)  # of compact records


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a study stands.

    Attributes:
        done, failed, running: ids of cells; the failed with the last line of what they said.
        total: how many cells the plan has.
        seconds_per_cell: median over the finished ones; None before the first.
    """

    done: tuple[str, ...]
    failed: dict[str, str]
    running: tuple[str, ...]
    total: int
    seconds_per_cell: float | None

    @property
    def left(self) -> int:
        """Cells without a record."""
        return self.total - len(self.done)


@dataclass(frozen=True)
class StudyFolder:
    """A folder that holds a plan.

    Attributes:
        path: of the folder.
        plan: that it holds.
    """

    path: Path
    plan: Plan

    @classmethod
    def open(cls, path: str | Path) -> StudyFolder:
        """A folder that a study was begun in; `UserError` if it holds none."""
        path = Path(path)
        if not os.path.isfile(path / "plan.yaml"):
            raise UserError(
                f"study: {shown(str(path))} holds no plan.yaml; begin with oasis study run"
            )
        return cls(path, load_plan(path / "plan.yaml"))

    @classmethod
    def begin(cls, path: str | Path, plan: Plan) -> StudyFolder:
        """`path`, new or begun with the same plan.

        Raises:
            UserError: the folder holds something else, or another plan.
        """
        path = Path(path)
        if not os.path.isfile(path / "plan.yaml"):
            # A kill in the middle of writing the plan leaves a hidden file.
            if not (
                os.path.isdir(path)
                and all(p.name.startswith(".plan.yaml.") for p in path.iterdir())
            ):
                check_free(path)
            write_text(path / "plan.yaml", plan_text(plan))
        folder = cls.open(path)
        kept, asked = folder.plan.to_dict(), plan.to_dict()
        for name, value in asked.items():
            if kept[name] != value:
                raise UserError(
                    f"out: {str(path)!r} holds a study with other {name}: "
                    f"{json.dumps(kept[name])[:200]}; name a new folder"
                )
        return folder

    def record_path(self, cell: Cell) -> Path:
        """Where the record of `cell` is, or will be."""
        return self.path / "cells" / f"{cell.id}.json"

    def failure_path(self, cell: Cell) -> Path:
        """Where it says why `cell` failed, if it did."""
        return self.path / "failed" / f"{cell.id}.log"

    def work_path(self, cell: Cell) -> Path:
        """Where `cell` keeps what it needs on the way."""
        return self.path / "work" / cell.id

    def run(self, cell_id: str) -> TrialRecord:
        """Run one cell in this process."""
        cell = self.plan.cell(cell_id)
        command = reproduce(self.plan, cell)
        return run_cell(cell, self.record_path(cell), self.work_path(cell), command=command)

    def missing(self) -> list[Cell]:
        """Cells without a record, in the plan's order."""
        return [cell for cell in self.plan.cells if not self.has(cell)]

    def has(self, cell: Cell) -> bool:
        """Whether there is a record of `cell`."""
        return self.record_path(cell).is_file() or cell.id in self._published

    def take_over(self, other: StudyFolder) -> None:
        """Copy the records of cells that `other` has finished and this study lacks."""
        theirs = other.records()
        for cell in self.missing():
            if cell in theirs:
                theirs[cell].save(self.record_path(cell))

    def records(self) -> dict[Cell, TrialRecord]:
        """The finished cells; `UserError` if a record is not of its cell."""
        found = {}
        for cell in self.plan.cells:
            path = self.record_path(cell)
            if path.is_file():
                record = TrialRecord.load(path)
            elif cell.id in self._published:
                path, record = self.path / TRIALS, self._published[cell.id]
            else:
                continue
            if record.trial != cell.to_dict():
                raise UserError(f"record: {str(path)!r} is of another cell")
            config = record.model.config or {}
            for name in ("residual", "depth_normalizer"):
                if not isinstance(config.get(name), str):
                    raise UserError(f"record: {str(path)!r} has no {name} in model.config")
            found[cell] = record
        return found

    @cached_property
    def _published(self) -> dict[str, TrialRecord]:
        """The compact records of `trials.jsonl`, by cell."""
        path = self.path / TRIALS
        if not path.is_file():
            return {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"record: {str(path)!r} cannot be read ({error})") from error
        numbered = enumerate(lines, start=1)
        records = (TrialRecord.from_json(line, f"{path}:{n}") for n, line in numbered)
        return {record.model.name: record for record in records}

    def publish(self, path: str | Path) -> None:
        """Write plan and records to the folder `path` in compact form: what tables and docs read.

        Metrics of single tensors are left out, and all tables but those of `KEPT_TABLES`.
        """
        lines = [_compact(record).to_json(indent=None) for record in self.records().values()]
        write_text(Path(path) / "plan.yaml", plan_text(self.plan))
        write_text(Path(path) / TRIALS, "".join(f"{line}\n" for line in lines))

    def status(self) -> Status:
        """Where the study stands now."""
        done, left = self.records(), self.missing()
        seconds = [record[TIMES[0]] for record in done.values()]
        return Status(
            done=tuple(cell.id for cell in done),
            failed={c.id: self.reason(c) for c in left if self.failure_path(c).is_file()},
            running=tuple(c.id for c in left if is_locked(self.path / "work" / f"{c.id}.lock")),
            total=len(self.plan.cells),
            seconds_per_cell=median(seconds) if seconds else None,
        )

    def reason(self, cell: Cell) -> str:
        """The last line of what a failed cell said; empty if it did not fail."""
        path = self.failure_path(cell)
        if not path.is_file():
            return ""
        return path.read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2]


def _compact(record: TrialRecord) -> TrialRecord:
    return replace(
        record,
        metrics=tuple(metric for metric in record.metrics if not metric.where),
        tables={name: table for name, table in record.tables.items() if name in KEPT_TABLES},
    )


def reproduce(plan: Plan, cell: Cell) -> str:
    """The command that makes `cell` again; `plan.yaml` is the one kept beside its record's folder,
    where the plan is not one of those that come with the package."""
    shipped = shipped_plans().get(plan.name)
    same = shipped is not None and parse_plan(shipped, plan.name) == plan
    return f"oasis study cell {plan.name if same else 'plan.yaml'} {cell.id} --out cell.json"
