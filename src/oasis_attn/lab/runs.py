"""A file of finished training runs, one JSON object per line, so that an experiment can resume."""

from __future__ import annotations

import gzip
import json
import time
import traceback
import zlib
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from oasis_attn.errors import UserError, parse_json
from oasis_attn.files import write_bytes
from oasis_attn.lab.attention_only_training import Measurement, Trained

_DIGITS = 5

Unit = TypeVar("Unit", bound=Hashable)
Run = dict[str, Any]
"""`group`, the fields of `Trained` but the model, the trained null logits, and `Measurement`."""


def run_row(group: str, trained: Trained, measurement: Measurement) -> Run:
    """A finished run; its numbers have five significant digits.

    Args:
        group: names what the runs of one group share.
        trained: the model.
        measurement: of the model.
    """
    numbers = {"null_logits": trained.model.null_logit[0].tolist()} | asdict(measurement)
    return {
        "group": group,
        "seed": trained.start.seed,
        "null_logit": trained.start.null_logit,
        "steps": trained.steps,
        "solved": trained.solved,
    } | {name: rounded(value) for name, value in numbers.items()}


def rounded(value: Any, digits: int = _DIGITS) -> Any:
    """A number, or nested lists of numbers, with so many significant digits; infinity as text."""
    if isinstance(value, list | tuple):
        return [rounded(each, digits) for each in value]
    if value in (float("inf"), -float("inf")):
        return str(value)
    return float(f"{value:.{digits}g}")


class RunFile:
    """The finished runs in a file; the file is replaced, never partly written.

    Args:
        path: read if it exists; compressed if its name ends in `.gz`.

    Raises:
        UserError: the file is not readable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Run] = []
        if path.exists():
            try:
                data = path.read_bytes()
                text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
                self.rows = [parse_json(line) for line in text.splitlines()]
                if not all(isinstance(row, dict) and "group" in row for row in self.rows):
                    raise ValueError("a line is not a run")
            except (OSError, EOFError, ValueError, zlib.error) as error:
                raise UserError(f"out: {str(path)!r} is not a file of runs ({error})") from error

    def add(self, rows: list[Run]) -> None:
        self.rows += rows
        lines = (json.dumps(row, separators=(",", ":"), allow_nan=False) for row in self.rows)
        data = "".join(f"{line}\n" for line in lines).encode()
        write_bytes(self.path, gzip.compress(data, mtime=0) if self.path.suffix == ".gz" else data)

    def of(self, group: str) -> list[Run]:
        """The runs of a group."""
        return [row for row in self.rows if row["group"] == group]


def run_in_processes(
    file: RunFile,
    missing: Callable[[RunFile], Iterable[Unit]],
    run: Callable[[Unit], Run],
    *,
    workers: int,
    minutes: float | None = None,
) -> None:
    """Run what is missing of an experiment in processes of one thread, until nothing is.

    Args:
        file: receives each run, and the version of PyTorch, as soon as it is finished.
        missing: the units that `file` lacks, the most important first.
        run: runs one unit; a function of a module, because the processes import it.
        workers: number of processes.
        minutes: no unit is started later.

    Raises:
        RuntimeError: units failed; all others were run.
    """
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    running: dict[Future[Run], Unit] = {}
    failed: set[Unit] = set()
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with pool:
        while True:
            busy = failed | set(running.values())
            for unit in missing(file):
                if len(running) == workers or time.monotonic() > end:
                    break
                if unit not in busy:
                    running[pool.submit(run, unit)] = unit
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                unit = running.pop(future)
                try:
                    file.add([future.result() | {"torch": torch.__version__}])
                    print(f"{len(file.rows)} runs, the last: {unit}", flush=True)
                except Exception:
                    traceback.print_exc()
                    failed.add(unit)
    if failed:
        raise RuntimeError(f"{len(failed)} units failed: {failed}")
