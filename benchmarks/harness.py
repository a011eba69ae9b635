"""Measure times (medians of interleaved rounds) and peak memory (a new process for each case)."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

Case = Callable[[], object]


def medians(cases: dict[str, Case], rounds: int) -> dict[str, float]:
    """Median seconds of each case; after a warm-up, every round runs all cases in turn."""
    for case in cases.values():
        case()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def peak_memory(case: Case) -> int:
    """Peak memory of running `case`, in bytes, beyond the memory of the process before (Linux)."""

    def field(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
        raise OSError(f"/proc/self/status has no {name}")

    before = field("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    case()
    return field("VmHWM") - before


def in_new_process(script: str, *arguments: object) -> float:
    """The last line that `python script arguments...` prints, as a number."""
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return float(json.loads(done.stdout.splitlines()[-1]))
