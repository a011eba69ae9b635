"""The log of samples: one JSON line each, kept as they come, so that a killed run can go on."""

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
    """Samples of one task under one set of settings, in a file or in memory only.

    A file may hold samples of several settings: each line carries the hash of its own, and a line
    of its own tells what they are.  Only samples of the present settings are taken up again.

    Args:
        path: a .jsonl file; None keeps the samples in memory.
        settings: all that decides what a sample says, as JSON takes it.
        says: what each sample has besides its `id` and `repeat`, by type: `str`, `int` (of at
            least 1) or `float`.
        resume: go on from what the file holds; a half-written last line is dropped.

    Raises:
        UserError: a file with something in it while `resume` is False, or one of another form.
    """

    def __init__(
        self,
        path: Path | None,
        settings: dict[str, Any],
        *,
        says: Mapping[str, type] = MappingProxyType({}),
        resume: bool,
    ) -> None:
        text = json.dumps(settings, sort_keys=True)
        self.settings = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = path
        self._says = says
        self._samples: dict[Key, Sample] = {}
        if path is None:
            return
        check_log(path, resume=resume)
        with writing(path, "samples"):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not self._take_up(path):
            self._write([{"settings": self.settings, "are": settings}])

    def _take_up(self, path: Path) -> bool:
        """Read what is there; whether the present settings are told in it already."""
        told = False
        if not path.exists():
            return told
        with writing(path, "samples"), path.open("rb+") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            file.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                row = parse_json(line)
                if row.pop("settings") != self.settings:
                    continue
                if "are" in row:
                    told = True
                else:
                    self._check(row)
                    self._samples[row["id"], row["repeat"]] = row
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(
                    f"samples: {str(path)!r} line {number} is not a logged sample ({error!r})"
                ) from error
        return told

    def _check(self, row: Sample) -> None:
        for name in ("id", "repeat"):
            if type(row[name]) is not int:
                raise TypeError(f"{name} is no whole number")
        for name, kind in self._says.items():
            if type(row[name]) is not kind or (kind is int and row[name] < 1):
                raise TypeError(f"{name} is not of type {kind.__name__}")

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
            with writing(self.path, "samples"), self.path.open("a", encoding="utf-8") as file:
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
