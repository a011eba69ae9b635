"""How a cell gets a process: on this machine, or on a cluster through submitit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from oasis_attn.errors import UserError, check_choice
from oasis_attn.files import write_text
from oasis_attn.study.plan import Cell

if TYPE_CHECKING:
    from oasis_attn.study.folder import StudyFolder

_STOP = 10  # seconds, before a process that was asked to end is killed
CLUSTERS = ("slurm", "local")


class Job(Protocol):
    """A cell that was started."""

    def ended(self) -> bool:
        """Whether it has ended, well or badly."""

    def close(self) -> None:
        """After it ended: leave a log under `failed` where there is no record."""

    def stop(self) -> None:
        """End it, if this process is the one to do so."""


class Launcher(Protocol):
    """Starts cells."""

    def begin(self, folder: StudyFolder) -> None:
        """Once, before the first: `UserError` if it could start none."""

    def start(self, folder: StudyFolder, cell: Cell) -> Job:
        """Start one."""


class Processes:
    """A process for each cell, `oasis study cell`, that ends when this one does, however it does.

    Each holds the reading end of a pipe from this process, and ends when it is closed.
    """

    def begin(self, folder: StudyFolder) -> None:
        """Nothing is needed."""

    def start(self, folder: StudyFolder, cell: Cell) -> Job:
        log = folder.work_path(cell).with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        return _Process(folder, cell, log)


class _Process:
    def __init__(self, folder: StudyFolder, cell: Cell, log: Path):
        self._record, self._failure = folder.record_path(cell), folder.failure_path(cell)
        self._log = log
        threads = str(cell.threads)
        words = [sys.executable, "-m", "oasis_attn", "study", "cell", str(folder.path), cell.id]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [*words, "--tied"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=file,
                env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
                start_new_session=True,  # an interruption is ours to pass on
            )

    def ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if not self._record.is_file():
            said = self._log.read_text(encoding="utf-8", errors="replace").rstrip()
            code = self._process.returncode
            if code < 0 or not said:
                said += f"\nended with code {code}" if code >= 0 else f"\nkilled by signal {-code}"
            write_text(self._failure, said + "\n")
        self._log.unlink(missing_ok=True)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._log.unlink(missing_ok=True)


class Cluster:
    """A cluster job for each cell, through submitit; jobs outlive this process.

    Args:
        cluster: `slurm`, or `local`: submitit's own processes on this machine.
        parameters: of submitit's executor, such as timeout_min or slurm_partition.

    Raises:
        UserError: submitit is absent; by `begin`: the cluster is, or a parameter is unknown there.
    """

    def __init__(self, cluster: str, parameters: Mapping[str, Any] | None = None):
        check_choice("cluster", cluster, CLUSTERS)
        try:
            import submitit
        except ImportError:
            raise UserError(
                "cluster: it needs submitit; pip install 'oasis-attn[cluster]'"
            ) from None
        self._cluster = cluster
        self._parameters = {"timeout_min": 60, **(parameters or {})}
        self._make = submitit.AutoExecutor
        self._executor: Any = None

    def begin(self, folder: StudyFolder) -> None:
        try:
            executor = self._make(folder=folder.path / "work" / "jobs", cluster=self._cluster)
            executor.update_parameters(**self._parameters)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise UserError(f"cluster: {' '.join(str(error).split())}") from error
        self._executor = executor

    def start(self, folder: StudyFolder, cell: Cell) -> Job:
        self._executor.update_parameters(name=cell.id)
        job = self._executor.submit(run_in_job, str(folder.path.resolve()), cell.id)
        return _ClusterJob(job, folder, cell)


class _ClusterJob:
    def __init__(self, job: Any, folder: StudyFolder, cell: Cell):
        self._job = job
        self._record, self._failure = folder.record_path(cell), folder.failure_path(cell)

    def ended(self) -> bool:
        return bool(self._job.done())

    def close(self) -> None:
        if not self._record.is_file():
            said = (self._job.stderr() or "").rstrip()
            write_text(self._failure, f"{said}\njob {self._job.job_id} ended without a record\n")

    def stop(self) -> None:
        """Nothing: it goes on, and its record is found by the next run."""


def run_in_job(folder: str, cell_id: str) -> None:
    """What a cluster job runs."""
    from oasis_attn.study.folder import StudyFolder

    StudyFolder.open(folder).run(cell_id)
