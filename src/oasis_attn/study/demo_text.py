"""What the demo says in words about its records."""

from __future__ import annotations

from typing import Any

from oasis_attn.records import DiagnosisRecord, TrialRecord

NAMES = {
    "vanilla": "Standard attention",
    "attn_residual": "Attention Residuals",
    "oasis": "OASIS, null as published",
    "strong": "OASIS, strong null",
}
"""The variants of the lab in plain words."""


def percent(share: float) -> str:
    """A share as a percentage with two significant digits; above 99%, with three."""
    digits = 3 if share > 0.99 else 2
    return f"{float(f'{100 * share:.{digits}g}'):g}%"


def relative_errors(record: TrialRecord) -> tuple[float, float, float]:
    """The error of a decoder relative to the mean square of its targets: as trained, in static
    8 bits, and in 4 bits."""
    power = record["task.error"] / record["task.relative_error"]
    quantized = (record[f"task.error@{name}"] for name in ("w8a8-static-full", "w4a4"))
    static, low = (error / power for error in quantized)
    return record["task.relative_error"], static, low


def largest_activation(record: DiagnosisRecord) -> dict[str, Any]:
    """The largest activation of any layer."""
    rows: list[dict[str, Any]] = record.tables["outlier.largest"]
    return max(rows, key=lambda row: abs(row["largest"]))
