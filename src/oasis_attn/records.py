"""The typed record that measuring, quantising and training fill, and that reports read.

A number has a name (its definition), a place (the tensor), a count and, where it is a mean, a
standard error.  A record adds what is needed to get the number again: the model and its settings,
the data, the seed, the versions, the hardware and the commit.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from oasis_attn.errors import UserError, parse_json, shown
from oasis_attn.files import write_text

FORMAT = 1
_PACKAGES = ("oasis-attn", "torch", "transformers", "accelerate", "tokenizers", "datasets", "numpy")


@cache
def machine() -> dict[str, Any]:
    """Versions, hardware and the git commit of the running code (computed once per process)."""
    import torch

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "versions": versions,
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.system(),
        "commit": _commit(),
    }


@cache
def processor() -> str:
    """The processor's name, and the widest vectors that PyTorch finds in it.

    One name may stand for several generations, and the width decides in which order sums are taken.
    """
    import torch

    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = next(names, name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str | None:
    """The commit the package's own source was read from, `+` if it has since been changed."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        if not git("ls-files", "--", Path(__file__).name):
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number.

    Attributes:
        name: the definition, dotted (`outlier.max_inf_norm`, `perplexity.windowed`).
        value: the number; it may be infinite or NaN, and is stored as such.
        where: the tensor, layer or head it was read at; empty for the whole model.
        n: how many samples (sequences, windows, steps) it is a mean or maximum over.
        standard_error: of the mean over these samples; None where it is not a mean.
    """

    name: str
    value: float
    where: str = ""
    n: int = 1
    standard_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was measured, on what, and how to get it again.

    Attributes:
        kind: `diagnosis`, `training`, `quantization`, `evaluation`, `cell` (of a study) or
            `benchmark`.
        subject: the model: name, variant, settings, parameter count.
        data: corpus, split, content hash, windows, tokens.
        seed: of the run; None where nothing was drawn.
        metrics: the numbers.
        tables: named arrays as nested lists (per layer and head, per step), for figures.
        environment: versions, hardware, threads and git commit; filled in by default.
        created: UTC time, ISO 8601.
    """

    kind: str
    subject: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    metrics: tuple[Metric, ...] = ()
    tables: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=lambda: dict(machine()))
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def metric(self, name: str, where: str = "") -> Metric:
        """The metric of this name and place; `UserError` naming what there is if it is absent."""
        for metric in self.metrics:
            if metric.name == name and metric.where == where:
                return metric
        there = sorted({m.name for m in self.metrics if m.where == where})
        raise UserError(f"metric: {name!r} at {where!r} is not in this record; it has {there}")

    def __getitem__(self, name: str) -> float:
        """The value of the whole-model metric `name`."""
        return self.metric(name).value

    def each(self, name: str) -> Iterator[Metric]:
        """All metrics of this name, one per place."""
        return (metric for metric in self.metrics if metric.name == name)

    def to_json(self, indent: int | None = 1) -> str:
        """Standard JSON (RFC 8259); a number that is not finite is the string float() reads.

        `indent` is as in `json.dumps`; None gives one line without spaces.
        """
        separators = (",", ":") if indent is None else None
        fields = {"format": FORMAT} | _plain(asdict(self))
        return json.dumps(fields, indent=indent, separators=separators, allow_nan=False)

    def save(self, path: str | Path) -> Path:
        """Write the record as JSON, beside its place and renamed."""
        return write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a record back; `UserError` if the file is absent, broken or of another format."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"record: {str(path)!r} is not a readable record ({error})") from error
        return cls.from_json(text, path)

    @classmethod
    def from_json(cls, text: str, path: str | Path) -> Record:
        """The record that `to_json` wrote; `UserError` naming `path` if it is broken."""
        try:
            found = parse_json(text)
            if isinstance(found, dict) and found.pop("format", None) != FORMAT:
                raise ValueError(f"it is of another format than {FORMAT}")
            _fields("record", found, _RECORD)
            if not isinstance(found["environment"].get("versions", {}), dict):
                raise ValueError("versions in environment of a record is no mapping")
            metrics = tuple(
                Metric(**_numbers(_fields("metric", each, _METRIC))) for each in found["metrics"]
            )
            return cls(**{**found, "metrics": metrics})
        except ValueError as error:
            raise UserError(f"record: {str(path)!r} is not a readable record ({error})") from error


_NUMBER: tuple[type, ...] = (int, float, str)  # text where it is not finite
_RECORD: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "subject": (dict,),
    "data": (dict,),
    "seed": (int, type(None)),
    "metrics": (list,),
    "tables": (dict,),
    "environment": (dict,),
    "created": (str,),
}
_METRIC: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "value": _NUMBER,
    "where": (str,),
    "n": (int,),
    "standard_error": (*_NUMBER, type(None)),
}


def _fields(what: str, found: Any, types: dict[str, tuple[type, ...]]) -> dict[str, Any]:
    """`found`, if it is a mapping with these fields, each of its type, and no other."""
    if not isinstance(found, dict) or found.keys() != types.keys():
        raise ValueError(f"a {what} has the fields {', '.join(types)}")
    for name, allowed in types.items():
        if type(found[name]) not in allowed:
            raise ValueError(f"{name} of a {what} is {shown(found[name])}")
    return found


def _numbers(metric: dict[str, Any]) -> dict[str, Any]:
    """A metric's fields as they were before `_plain`."""
    given = {name: metric[name] for name in ("value", "standard_error")}
    return metric | {name: float(x) for name, x in given.items() if x is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
