"""The log of samples: one JSON line each, kept as they come, so that a killed run can go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from oasis_attn.errors import UserError
from oasis_attn.files import check_writable

Sample = dict[str, Any]
Key = tuple[int, int]  # problem or window, repeat


class SampleLog:
    """Samples of one task under one set of settings, in a file or in memory only.

    A file may hold samples of several settings: each line carries the hash of its own, and a line
    of its own tells what they are.  Only samples of the present settings are taken up again.

    Args:
        path: a .jsonl file; None keeps the samples in memory.
        settings: all that decides what a sample says, as JSON takes it.
        resume: go on from what the file holds; a half-written last line is dropped.

    Raises:
        UserError: a file with something in it while `resume` is False, or one of another form.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], *, resume: bool) -> None:
        text = json.dumps(settings, sort_keys=True)
        self.settings = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = path
        self._samples: dict[Key, Sample] = {}
        if path is None:
            return
        check_log(path, resume=resume)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._take_up(path):
            self._write([{"settings": self.settings, "are": settings}])

    def _take_up(self, path: Path) -> bool:
        """Read what is there; whether the present settings are told in it already."""
        told = False
        if not path.exists():
            return told
        with path.open("rb+") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            file.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                if row.pop("settings") != self.settings:
                    continue
                if "are" in row:
                    told = True
                else:
                    self._samples[row["id"], row["repeat"]] = row
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(
                    f"samples: {str(path)!r} line {number} is not a logged sample"
                ) from error
        return told

    def __contains__(self, key: Key) -> bool:
        return key in self._samples

    def __getitem__(self, key: Key) -> Sample:
        return self._samples[key]

    def add(self, samples: Iterable[Sample]) -> None:
        """Log those whose `id` and `repeat` are new."""
        new = [row for row in samples if (row["id"], row["repeat"]) not in self]
        self._write([{"settings": self.settings} | row for row in new])
        self._samples |= {(row["id"], row["repeat"]): row for row in new}

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                os.fsync(file.fileno())


def check_log(path: Path, *, resume: bool) -> None:
    """Raise `UserError` if `path` holds samples that a run not resumed would mix with its own, or
    cannot be written."""
    check_writable(path, "samples")
    if not resume and path.exists() and path.stat().st_size:
        raise UserError(f"samples: {str(path)!r} exists; resume it, or name another folder")
