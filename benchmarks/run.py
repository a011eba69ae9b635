"""Run all benchmarks, compare them with their bounds, print a table, and save the record.

python benchmarks/run.py [--rounds N] [attention] [training_step] [decoding] [integer] ...
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import attention
import decoding
import diagnosis
import integer
import loading
import training_step
from oasis_attn.records import BenchmarkRecord, Metric

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "benchmarks.json"
BOUNDS = {
    "attention.time_over_sdpa": ("<=", 1.08),
    "attention.memory_over_sdpa": ("<=", 1.1),
    "training_step.oasis_block_time_over_vanilla": ("<=", 1.10),
    "training_step.oasis_block_memory_over_vanilla": ("<=", 1.15),
    "training_step.oasis_time_over_vanilla": ("<=", 1.10),
    "training_step.oasis_memory_over_vanilla": ("<=", 1.15),
    "training_step.oasis_time_over_authors": ("<=", 0.5),
    "training_step.oasis_memory_over_authors": ("<=", 0.5),
    "decoding.generate_oasis_block_speed_over_stock": (">=", 0.95),
    "decoding.generate_oasis_speed_over_stock": (">=", 0.90),
    "decoding.generate_oasis_block_speed_over_pytorch": (
        ">=",
        1.10,
    ),  # else remove c_kernels.c
    "decoding.generate_oasis_speed_over_pytorch": (">=", 1.10),
    "decoding.prefill_oasis_block_speed_over_stock": (">=", 0.93),
    "decoding.prefill_oasis_speed_over_stock": (">=", 0.93),
    "diagnosis.time_over_forward": ("<=", 1.3),
    "integer.simulated_w8a8_static_linear_speed_over_float": (">=", 0.5),
    "integer.simulated_w8a8_static_full_speed_over_float": (">=", 0.5),
    "integer.simulated_w8a8_dynamic_speed_over_float": (">=", 0.5),
    "integer.simulated_w4a4_speed_over_float": (">=", 0.5),
    "loading.load_memory_over_weights": ("<=", 1.3),
    "loading.convert_memory_over_weights": ("<=", 1.3),
    "start.import_seconds_beyond_torch": ("<=", 0.3),
    "start.help_seconds": ("<=", 1.0),
}


def start(rounds: int) -> dict[str, float]:
    """Seconds to import the package, without those for torch, and to show --help."""

    def seconds(*command: str) -> float:
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    torch, both = seconds("-c", "import torch"), seconds("-c", "import torch, oasis_attn")
    return {
        "start.import_seconds_beyond_torch": both - torch,
        "start.help_seconds": seconds("-m", "oasis_attn", "--help"),
    }


SUITES = {
    "attention": attention.measure,
    "training_step": training_step.measure,
    "decoding": decoding.measure,
    "diagnosis": diagnosis.measure,
    "integer": integer.measure,
    "loading": loading.measure,
    "start": start,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", metavar="|".join(SUITES))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if not set(arguments.suites) <= set(SUITES):
        parser.error(f"suites: {arguments.suites} are not all among {', '.join(SUITES)}")
    suites = arguments.suites or list(SUITES)
    numbers: dict[str, float] = {}
    for name in suites:
        numbers |= SUITES[name](arguments.rounds)

    table = Table("measure", "value", "bound", "holds")
    failed = False
    for name, value in numbers.items():
        relation, bound = BOUNDS.get(name, ("", None))
        holds = bound is None or (value <= bound if relation == "<=" else value >= bound)
        failed |= not holds
        shown = "" if bound is None else f"{relation} {bound}"
        table.add_row(
            name, f"{value:.3f}", shown, "" if bound is None else "yes" if holds else "NO"
        )
    Console().print(table)
    if set(suites) == set(SUITES):
        metrics = tuple(Metric(name=k, value=v, n=arguments.rounds) for k, v in numbers.items())
        settings = {"rounds": arguments.rounds}
        BenchmarkRecord(name="bounds", settings=settings, metrics=metrics).save(RESULTS)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
