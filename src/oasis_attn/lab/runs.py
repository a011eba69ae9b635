"""A file of finished training runs, one JSON object per line, so that an experiment can resume."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from oasis_attn.errors import UserError, parse_json
from oasis_attn.files import write_text
from oasis_attn.lab.attention_only_training import Measurement, Trained

_DIGITS = 5

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
    } | {name: _rounded(value) for name, value in numbers.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    if value in (float("inf"), -float("inf")):
        return str(value)
    return float(f"{value:.{_DIGITS}g}")


class RunFile:
    """The finished runs in a file; the file is replaced, never partly written.

    Args:
        path: read if it exists.

    Raises:
        UserError: the file is not readable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Run] = []
        if path.exists():
            try:
                self.rows = [parse_json(line) for line in path.read_text().splitlines()]
            except (OSError, ValueError) as error:
                raise UserError(f"out: {str(path)!r} is not a file of runs ({error})") from error

    def add(self, rows: list[Run]) -> None:
        self.rows += rows
        lines = (json.dumps(row, separators=(",", ":"), allow_nan=False) for row in self.rows)
        write_text(self.path, "".join(f"{line}\n" for line in lines))

    def of(self, group: str) -> list[Run]:
        """The runs of a group."""
        return [row for row in self.rows if row["group"] == group]
