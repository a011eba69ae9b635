"""A log with one JSON line for each sample, from which an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from oasis_attn.errors import UserError, parse_json
from oasis_attn.files import check_writable, writing

Sample = dict[str, Any]
Key = tuple[int, int]  # problem or window, repeat


class SampleLog:
    """The samples of one task and one protocol, in a file or in memory only.

    A file may have samples of several protocols: a line describes each protocol, and each sample
    has the hash of its protocol.  Only samples of the current protocol are reused.

    Args:
        path: a .jsonl file; None keeps the samples in memory.
        protocol: everything that decides the content of a sample, as JSON values.
        fields: the fields that each sample has beside its `id` and `repeat`, with their types:
            `str`, `int` (at least 1) or `float`.
        resume: continue from the content of the file; an incomplete last line is dropped.

    Raises:
        UserError: the file has content and `resume` is False, or it is not a log of samples.
    """

    def __init__(
        self,
        path: Path | None,
        protocol: dict[str, Any],
        *,
        fields: Mapping[str, type] = MappingProxyType({}),
        resume: bool,
    ) -> None:
        text = json.dumps(protocol, sort_keys=True)
        self.protocol = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = path
        self._fields = fields
        self._samples: dict[Key, Sample] = {}
        if path is None:
            return
        check_log(path, resume=resume)
        with writing(path, "samples"):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not self._read(path):
            self._write([{"protocol": self.protocol, "description": protocol}])

    def _read(self, path: Path) -> bool:
        """Read the samples in the file; whether it has the description of the protocol."""
        described = False
        if not path.exists():
            return described
        with writing(path, "samples"), path.open("rb+") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            file.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                row = parse_json(line)
                if row.pop("protocol") != self.protocol:
                    continue
                if "description" in row:
                    described = True
                else:
                    self._check(row)
                    self._samples[row["id"], row["repeat"]] = row
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(
                    f"samples: {str(path)!r} line {number} is not a logged sample ({error!r})"
                ) from error
        return described

    def _check(self, row: Sample) -> None:
        for name in ("id", "repeat"):
            if type(row[name]) is not int:
                raise TypeError(f"{name} is not a whole number")
        for name, kind in self._fields.items():
            if type(row[name]) is not kind or (kind is int and row[name] < 1):
                raise TypeError(f"{name} is not of type {kind.__name__}")

    def __contains__(self, key: Key) -> bool:
        return key in self._samples

    def __getitem__(self, key: Key) -> Sample:
        return self._samples[key]

    def add(self, samples: Iterable[Sample]) -> None:
        """Log the samples whose `id` and `repeat` are not in the log."""
        new = [row for row in samples if (row["id"], row["repeat"]) not in self]
        self._write([{"protocol": self.protocol} | row for row in new])
        self._samples |= {(row["id"], row["repeat"]): row for row in new}

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if self.path is not None:
            with writing(self.path, "samples"), self.path.open("a", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                os.fsync(file.fileno())


def check_log(path: Path, *, resume: bool) -> None:
    """Check that a log can be written to `path`.

    Raises:
        UserError: `path` cannot be written, or it has samples and `resume` is False.
    """
    check_writable(path, "samples")
    if not resume and path.exists() and path.stat().st_size:
        raise UserError(f"samples: {str(path)!r} exists; resume it, or use another folder")
