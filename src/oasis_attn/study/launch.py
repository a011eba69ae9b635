"""Start trials as processes of this machine, or as cluster jobs with submitit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from oasis_attn.errors import UserError, check_choice
from oasis_attn.extension_files import load_extensions, loaded_extensions
from oasis_attn.files import write_text
from oasis_attn.study.plan import Trial

if TYPE_CHECKING:
    from oasis_attn.study.storage import StudyFolder

_TERMINATE_TIMEOUT = 10  # seconds to wait after SIGTERM before SIGKILL
CLUSTERS = ("slurm", "local")


class Job(Protocol):
    """A trial that was started."""

    def ended(self) -> bool:
        """Whether the job has ended, successfully or not."""

    def close(self) -> None:
        """Clean up after the end; if there is no record, write a log under `failed`."""

    def stop(self) -> None:
        """Stop the job, unless it is independent of this process."""


class Launcher(Protocol):
    """Starts trials."""

    def begin(self, folder: StudyFolder) -> None:
        """Prepare, before the first trial; `UserError` if no trial can be started."""

    def start(self, folder: StudyFolder, trial: Trial) -> Job:
        """Start one trial."""


class ProcessLauncher:
    """Runs each trial in a process of `oasis study trial`.

    Each process reads a pipe from this process and exits when the pipe is closed, so that no
    process continues after this one ends, even if it was killed.
    """

    def begin(self, folder: StudyFolder) -> None:
        """No preparation is necessary."""

    def start(self, folder: StudyFolder, trial: Trial) -> Job:
        log = folder.work_path(trial).with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        return _ProcessJob(folder, trial, log)


class _ProcessJob:
    def __init__(self, folder: StudyFolder, trial: Trial, log: Path):
        self._record, self._failure = folder.record_path(trial), folder.failure_path(trial)
        self._log = log
        threads = str(trial.threads)
        command = [sys.executable, "-m", "oasis_attn"]
        command += [word for path in loaded_extensions() for word in ("--extension", path)]
        command += ["study", "trial", str(folder.path), trial.id, "--exit-with-parent"]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=file,
                env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
                start_new_session=True,  # Ctrl-C reaches only this process, which stops the trials
            )

    def ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if not self._record.is_file():
            output = self._log.read_text(encoding="utf-8", errors="replace").rstrip()
            code = self._process.returncode
            if code < 0:
                output += f"\nkilled by signal {-code}"
            elif not output:
                output = f"exit code {code}"
            write_text(self._failure, output + "\n")
        self._log.unlink(missing_ok=True)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_TERMINATE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._log.unlink(missing_ok=True)


class ClusterLauncher:
    """Runs each trial as a cluster job with submitit; jobs continue when this process ends.

    Args:
        cluster: `slurm`, or `local` for submitit's processes on this machine.
        options: parameters of submitit's executor, such as timeout_min or slurm_partition.

    Raises:
        UserError: submitit is not installed.  `begin` raises it if the cluster is not available or
            an option is unknown.
    """

    def __init__(self, cluster: str, options: Mapping[str, Any] | None = None):
        check_choice("cluster", cluster, CLUSTERS)
        try:
            import submitit
        except ImportError:
            raise UserError(
                "cluster: submitit is not installed; run pip install 'oasis-attn[cluster]'"
            ) from None
        self._cluster = cluster
        self._options = {"timeout_min": 60, **(options or {})}
        self._executor_class = submitit.AutoExecutor
        self._executor: Any = None

    def begin(self, folder: StudyFolder) -> None:
        try:
            executor = self._executor_class(
                folder=folder.path / "work" / "jobs", cluster=self._cluster
            )
            executor.update_parameters(**self._options)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise UserError(f"cluster: {' '.join(str(error).split())}") from error
        self._executor = executor

    def start(self, folder: StudyFolder, trial: Trial) -> Job:
        self._executor.update_parameters(name=trial.id)
        path = str(folder.path.resolve())
        job = self._executor.submit(run_in_job, path, trial.id, loaded_extensions())
        return _ClusterJob(job, folder, trial)


class _ClusterJob:
    def __init__(self, job: Any, folder: StudyFolder, trial: Trial):
        self._job = job
        self._record, self._failure = folder.record_path(trial), folder.failure_path(trial)

    def ended(self) -> bool:
        return bool(self._job.done())

    def close(self) -> None:
        if not self._record.is_file():
            output = (self._job.stderr() or "").rstrip()
            message = f"job {self._job.job_id} ended without a record"
            write_text(self._failure, f"{output}\n{message}\n")

    def stop(self) -> None:
        """Do nothing: the job continues, and the next run finds its record."""


def run_in_job(folder: str, trial_id: str, extensions: Sequence[str]) -> None:
    """Run one trial, with the extension files of the study; the function of a cluster job."""
    from oasis_attn.study.storage import StudyFolder

    load_extensions(extensions)
    StudyFolder.open(folder).run(trial_id)
