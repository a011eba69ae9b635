"""The folder of a study: its plan, and one record per finished trial.

OUT/plan.yaml           the plan; the folder accepts no other
OUT/trials/<id>.json    the record of a finished trial; never partly written
OUT/trials.jsonl.gz     of a published study, instead of trials/: one compact record per line
OUT/failed/<id>.log     the output of a trial that failed; removed when the trial is run again
OUT/work/               files of unfinished trials; can be removed while no trial runs
"""

from __future__ import annotations

import gzip
import json
import os
import shlex
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median

from oasis_attn.data.tasks import is_task
from oasis_attn.errors import UserError, reason
from oasis_attn.extension_files import extension_hashes
from oasis_attn.files import check_free, is_locked, write_bytes, write_text
from oasis_attn.records import TrialRecord
from oasis_attn.study.lookup import PLAN_FILE, plan_path, shipped_plans
from oasis_attn.study.plan import Plan, Trial
from oasis_attn.study.plan_file import load_plan, parse_plan, plan_text
from oasis_attn.study.study_metrics import TIMES

TRIALS = "trials.jsonl.gz"
KEPT_TABLES = (
    *("null.mass", "sink.idle", "sink.trigger", "null.idle", "null.trigger"),
    *("depth.weights", "signal.beta"),
)
"""The tables that compact records keep."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """The progress of a study.

    Attributes:
        done, running: ids of trials.
        failed: id -> the last line of the error output.
        total: number of trials in the plan.
        seconds_per_trial: median over the finished trials, without the start of their processes;
            None if there are none.
    """

    done: tuple[str, ...]
    failed: dict[str, str]
    running: tuple[str, ...]
    total: int
    seconds_per_trial: float | None

    @property
    def left(self) -> int:
        """Number of trials without a record."""
        return self.total - len(self.done)


def texts_of(records: Mapping[Trial, TrialRecord]) -> dict[str, str]:
    """The SHA-256 of the text of each corpus that trials were trained on.

    Raises:
        UserError: two trials were trained on different texts of the same name.
    """
    found: dict[str, str] = {}
    for trial, record in records.items():
        digest = record.train_corpus_sha256
        if not is_task(trial.corpus) and found.setdefault(trial.corpus, digest) != digest:
            first = next(other for other in records if other.corpus == trial.corpus)
            raise UserError(
                f"record: the trials {first.id!r} and {trial.id!r} were trained on different texts"
                f" of the name {trial.corpus!r}; remove the records of one of the texts"
            )
    return found


def check_texts(trials: Iterable[Trial], finished: Mapping[Trial, TrialRecord]) -> None:
    """Raise `UserError` if a corpus of `trials` is not the text that finished trials had."""
    from oasis_attn.data import load_corpus

    texts = texts_of(finished)
    for name in dict.fromkeys(trial.corpus for trial in trials):
        if name in texts and load_corpus(name).sha256 != texts[name]:
            raise UserError(
                f"corpora: the text of {name!r} is not the one that finished trials were trained"
                " on; restore it, use a new folder, or leave out --reuse-from"
            )


@dataclass(frozen=True)
class StudyFolder:
    """The folder of a study.

    Attributes:
        path: path of the folder.
        plan: the plan that it contains.
    """

    path: Path
    plan: Plan

    @classmethod
    def open(cls, path: str | Path) -> StudyFolder:
        """Open the folder of a study; `UserError` if it contains no plan."""
        return cls(Path(path), load_plan(plan_path(path)))

    @classmethod
    def begin(cls, path: str | Path, plan: Plan) -> StudyFolder:
        """Create the folder of a study, or open it if it contains the same plan.

        Raises:
            UserError: the folder contains other files or another plan.
        """
        path = Path(path)
        cls.check(path, plan)
        if not os.path.isfile(path / PLAN_FILE):
            write_text(path / PLAN_FILE, plan_text(plan))
        return cls.open(path)

    @classmethod
    def check(cls, path: Path, plan: Plan) -> None:
        """Raise `UserError` if the folder contains other files or another plan."""
        if not os.path.isfile(path / PLAN_FILE):
            # A process that is killed while it writes the plan leaves a hidden file.
            if not (
                os.path.isdir(path)
                and all(p.name.startswith(".plan.yaml.") for p in path.iterdir())
            ):
                check_free(path)
            return
        kept, asked = cls.open(path).plan.to_dict(), plan.to_dict()
        for name, value in asked.items():
            if kept[name] != value:
                raise UserError(
                    f"out: {str(path)!r} contains a study whose {name} is different: "
                    f"{json.dumps(kept[name])[:200]}; use a new folder"
                )

    def record_path(self, trial: Trial) -> Path:
        """Path of the record of `trial`, whether or not it exists."""
        return self.path / "trials" / f"{trial.id}.json"

    def failure_path(self, trial: Trial) -> Path:
        """Path of the error output of `trial`, if it failed."""
        return self.path / "failed" / f"{trial.id}.log"

    def work_path(self, trial: Trial) -> Path:
        """Folder for the files of `trial` while it runs."""
        return self.path / "work" / trial.id

    def run(self, trial_id: str) -> TrialRecord:
        """Run one trial in this process."""
        from oasis_attn.study.trial import run_trial  # imports torch

        trial = self.plan.trial(trial_id)
        self.plan.check([trial.variant])
        if not self.plan.on_task:
            check_texts([trial], self.records())
        command = rerun_command(self.plan, trial)
        return run_trial(trial, self.record_path(trial), self.work_path(trial), command=command)

    def missing(self) -> list[Trial]:
        """Trials without a record, in the plan's order."""
        return [trial for trial in self.plan.trials if not self.has(trial)]

    def has(self, trial: Trial) -> bool:
        """Whether the folder contains a record of `trial`."""
        return self.record_path(trial).is_file() or trial.id in self._published

    def reusable(self, others: Iterable[StudyFolder]) -> dict[Trial, TrialRecord]:
        """The records of trials that are missing here, from other studies.

        Raises:
            UserError: a study has no trial of this plan.
        """
        found: dict[Trial, TrialRecord] = {}
        missing, own = set(self.missing()), set(self.plan.trials)
        for other in others:
            records = other.records()
            if own.isdisjoint(records):
                raise UserError(
                    f"reuse_from: {str(other.path)!r} has no trial that is identical to one of the"
                    f" plan {self.plan.name!r}"
                )
            missing -= found.keys()
            found |= {trial: record for trial, record in records.items() if trial in missing}
        return found

    def add(self, records: Mapping[Trial, TrialRecord]) -> None:
        """Save the records of trials that have none here."""
        for trial, record in records.items():
            if not self.has(trial):
                record.save(self.record_path(trial))

    def records(self) -> dict[Trial, TrialRecord]:
        """The record of each finished trial.

        Raises:
            UserError: a record cannot be read or belongs to another trial; see also `texts_of`.
        """
        found = {}
        for trial in self.plan.trials:
            path = self.record_path(trial)
            if path.is_file():
                record = TrialRecord.load(path)
            elif trial.id in self._published:
                path, record = self.path / TRIALS, self._published[trial.id]
            else:
                continue
            if record.trial != trial.to_dict():
                raise UserError(f"record: {str(path)!r} belongs to another trial")
            config = record.model.config or {}
            for name in ("residual", "depth_normalizer"):
                if not isinstance(config.get(name), str):
                    raise UserError(f"record: {str(path)!r} has no {name} in model.config")
            found[trial] = record
        texts_of(found)
        return found

    @cached_property
    def _published(self) -> dict[str, TrialRecord]:
        """The compact records of `trials.jsonl.gz`, by trial id."""
        path = self.path / TRIALS
        if not path.is_file():
            return {}
        try:
            lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"record: {str(path)!r} cannot be read ({reason(error)})") from error
        numbered = enumerate(lines, start=1)
        records = (TrialRecord.from_json(line, f"{path}:{n}") for n, line in numbered)
        return {record.model.name: record for record in records}

    def publish(self, path: str | Path) -> None:
        """Write the plan and compact records to the folder `path`.

        Compact records have whole-model metrics only, and only the tables of `KEPT_TABLES`.
        """
        lines = [_compact(record).to_json(indent=None) for record in self.records().values()]
        text = "".join(f"{line}\n" for line in lines)
        write_text(Path(path) / PLAN_FILE, plan_text(self.plan))
        write_bytes(Path(path) / TRIALS, gzip.compress(text.encode(), mtime=0))

    def status(self) -> Status:
        """The current progress of the study."""
        done, left = self.records(), self.missing()
        seconds = [record[TIMES[0]] for record in done.values()]
        return Status(
            done=tuple(trial.id for trial in done),
            failed={c.id: self.reason(c) for c in left if self.failure_path(c).is_file()},
            running=tuple(c.id for c in left if is_locked(self.path / "work" / f"{c.id}.lock")),
            total=len(self.plan.trials),
            seconds_per_trial=median(seconds) if seconds else None,
        )

    def seconds(self, trial: Trial) -> float | None:
        """The run time of a finished trial, without the start of its process; None without one."""
        path = self.record_path(trial)
        return TrialRecord.load(path)[TIMES[0]] if path.is_file() else None

    def reason(self, trial: Trial) -> str:
        """The last line of the error output of a failed trial; empty if it did not fail."""
        path = self.failure_path(trial)
        if not path.is_file():
            return ""
        return path.read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2]


def _compact(record: TrialRecord) -> TrialRecord:
    return replace(
        record,
        metrics=tuple(metric for metric in record.metrics if not metric.where),
        tables={name: table for name, table in record.tables.items() if name in KEPT_TABLES},
    )


def rerun_command(plan: Plan, trial: Trial) -> str:
    """The command that runs `trial` again.

    It names the plan if it is one of the package; otherwise `plan.yaml`, the file in the folder of
    the study.  It names the extension files of this process without their folders.
    """
    shipped = shipped_plans().get(plan.name)
    same = shipped is not None and parse_plan(shipped, plan.name) == plan
    extensions = [word for name in extension_hashes() for word in ("--extension", name)]
    name = plan.name if same else PLAN_FILE
    return shlex.join(
        ["oasis", *extensions, "study", "trial", name, trial.id, "--out", "trial.json"]
    )
