"""Metrics and records, their files, and the checks of what is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

from oasis_attn.errors import UserError, check_choice, parse_json, shown
from oasis_attn.files import write_text
from oasis_attn.records.environment import Environment, current_environment
from oasis_attn.records.schema import decode, encode

_KINDS: dict[str, type[Record]] = {}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number.

    Attributes:
        name: its name in the glossary, dotted (`outlier.max_inf_norm`, `perplexity.windowed`).
        value: the number; it may be infinite or NaN, and is stored as such.
        where: the tensor, layer or head it was measured at, or the model (`before`, `after`) in a
            record of two; empty for the whole model.
        n: number of samples (sequences, windows, steps) that it is a mean or maximum over.
        standard_error: standard error of the mean over these samples; None without a mean.
    """

    name: str
    value: float
    where: str = ""
    n: int = 1
    standard_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """Numbers, and what is needed to reproduce them.  Each kind is a subclass.

    Attributes:
        seed: random seed of the run; None if nothing was random.
        metrics: the numbers.
        tables: named arrays as nested lists (per layer and head, per step), for figures.
        environment: versions, hardware, threads and git commit; by default, those of this process,
            on the CPU (see `current_environment`).
        created: UTC time, ISO 8601; by default, now.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1

    seed: int | None = None
    metrics: tuple[Metric, ...] = ()
    tables: dict[str, Any] = field(default_factory=dict)
    environment: Environment = field(default_factory=current_environment)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            _KINDS[cls.kind] = cls

    def metric(self, name: str, where: str = "") -> Metric:
        """The metric of this name and place.

        Raises:
            UserError: the record has none; the message lists the names that it has at `where`.
        """
        for metric in self.metrics:
            if metric.name == name and metric.where == where:
                return metric
        available = sorted({m.name for m in self.metrics if m.where == where})
        raise UserError(f"metric: {name!r} at {where!r} is not in this record; it has {available}")

    def __getitem__(self, name: str) -> float:
        """The value of the whole-model metric `name`."""
        return self.metric(name).value

    def each(self, name: str) -> Iterator[Metric]:
        """All metrics of this name, one per place."""
        return (metric for metric in self.metrics if metric.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values; infinity and NaN become strings (`nan`, `-inf`)."""
        values: dict[str, Any] = encode(self)
        common = {each.name: values.pop(each.name) for each in fields(Record)}
        return {"kind": self.kind, "version": self.version} | values | common

    def to_json(self, indent: int | None = 1) -> str:
        """Standard JSON (RFC 8259).

        Args:
            indent: as in `json.dumps`; None gives one line without spaces.
        """
        separators = (",", ":") if indent is None else None
        return json.dumps(self.to_dict(), indent=indent, separators=separators, allow_nan=False)

    def save(self, path: str | Path) -> Path:
        """Write the record as JSON; the file appears, or is replaced, only when it is complete."""
        return write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a record of this class; `Record.load` reads any kind.

        Raises:
            UserError: the file is absent or broken, or of another kind, version or schema.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise UserError(f"record: {str(path)!r} does not exist") from error
        except (OSError, ValueError) as error:
            raise UserError(f"record: {str(path)!r} is not a readable record ({error})") from error
        return cls.from_json(text, path)

    @classmethod
    def from_json(cls, text: str, path: str | Path) -> Self:
        """Read the result of `to_json`; errors are those of `load`, and name `path`."""
        try:
            return cls._from_dict(parse_json(text))
        except ValueError as error:
            raise UserError(f"record: {str(path)!r} is not a readable record ({error})") from error

    @classmethod
    def _from_dict(cls, found: Any) -> Self:
        if not isinstance(found, dict):
            raise ValueError(f"{shown(found)} is not a JSON object")
        kind, version = found.pop("kind", None), found.pop("version", None)
        check_choice("kind", kind, [n for n, each in _KINDS.items() if issubclass(each, cls)])
        schema = _KINDS[kind]
        if type(version) is not int or version != schema.version:
            raise ValueError(
                f"version: {shown(version)} of kind {kind!r} is not {schema.version}, "
                "which this release reads"
            )
        record: Self = decode(schema, found, kind)
        return record
