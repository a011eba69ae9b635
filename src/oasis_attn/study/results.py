"""What a study's records say: values by variant and unit, and comparisons of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean

from oasis_attn.records import TrialRecord
from oasis_attn.study.measures import Measure, measures
from oasis_attn.study.plan import Cell, Plan
from oasis_attn.study.statistics import Comparison, compare, holm, noise_floor

Unit = tuple[str, str, int]
MEAN = "their mean"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One comparison of a table.

    Attributes:
        measure: what is compared.
        subject: row.
        against: row, or `MEAN` of several.
        numbers: of the comparison.
        p: its p-value, corrected for all comparisons of the table.
        floor, floor_n: what a change of seed alone makes, relative, and the pairs it is from.
    """

    measure: Measure
    subject: str
    against: str
    numbers: Comparison
    p: float
    floor: float
    floor_n: int


@dataclass(frozen=True)
class Results:
    """The records of a study by cell.

    Attributes:
        plan: of the study.
        records: of its finished cells.
    """

    plan: Plan
    records: Mapping[Cell, TrialRecord]

    @cached_property
    def _values(self) -> dict[tuple[str, str], dict[Unit, float]]:
        """(measure, row) -> unit -> value, of all that was measured."""
        found: dict[tuple[str, str], dict[Unit, float]] = {}
        for cell, record in self.records.items():
            for metric in record.metrics:
                if not metric.where:
                    found.setdefault((metric.name, cell.row), {})[cell.unit] = metric.value
        return found

    @cached_property
    def measures(self) -> tuple[Measure, ...]:
        """Those that some record has."""
        named = {name for name, _ in self._values}
        return tuple(m for m in measures(self.plan.schemes) if m.name in named)

    def values(self, measure: Measure, row: str) -> dict[Unit, float]:
        """The measure of a row's models, by unit, in the plan's order; noise seeds left out."""
        found = self._values.get((measure.name, row), {})
        return {unit: v for unit, v in found.items() if unit[2] in self.plan.seeds}

    def floor(self, measure: Measure) -> tuple[float, int]:
        """`noise_floor` of the reference row: all its seeds, corpus by corpus and size by size."""
        groups: dict[tuple[str, str], list[float]] = {}
        for (corpus, size, _), value in self._values.get(
            (measure.name, self.plan.reference), {}
        ).items():
            groups.setdefault((corpus, size), []).append(value)
        return noise_floor(groups.values(), measure.scale)

    def compare(self, measure: Measure, subject: str, against: Sequence[str]) -> Comparison | None:
        """A row with another, or with the mean of several, in the units that all of them have.

        None where there is no such unit.  The mean is taken unit by unit.
        """
        tables = [self.values(measure, row) for row in (subject, *against)]
        units = [unit for unit in tables[0] if all(unit in table for table in tables)]
        if not units:
            return None
        baseline = [fmean(table[unit] for table in tables[1:]) for unit in units]
        return compare([tables[0][unit] for unit in units], baseline, measure.scale)

    def comparisons(self, subject: str) -> list[Compared]:
        """A row with each of those the plan compares it with, and their mean; for each measure.

        Measures that only one of two has are left out.  The p-values are corrected together.
        """
        baselines = self.plan.compare[subject]
        groups: dict[str, tuple[str, ...]] = {row: (row,) for row in baselines}
        if len(baselines) > 1:
            groups[MEAN] = tuple(baselines)
        found = []
        for measure in self.measures:
            if not measure.better:
                continue
            floor, floor_n = self.floor(measure)
            for against, rows in groups.items():
                numbers = self.compare(measure, subject, rows)
                if numbers is not None:
                    found.append(
                        Compared(
                            measure=measure, subject=subject, against=against, numbers=numbers,
                            p=numbers.p, floor=floor, floor_n=floor_n,
                        )
                    )  # fmt: skip
        corrected = holm(each.numbers.p for each in found)
        return [replace(each, p=p) for each, p in zip(found, corrected, strict=True)]
