"""Made word problems under few bits: a nano model learns them, then loses bits.

python benchmarks/arith.py --runs FOLDER

Trains a model on `arith`, quantizes it by scheme and lets it solve problems of the test part: less
than an hour.  A run that is finished in FOLDER is not repeated.  Record and
table go to docs/results/arith.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from oasis_attn.files import write_text
from oasis_attn.records import BenchmarkRecord, EvaluationRecord, Metric
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import Table

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "arith"
TRAIN = (
    "train --variant vanilla --size nano --corpus arith --steps 2500 --batch-size 8"
    " --block-length 256 --learning-rate 3e-3 --vocab-size 512 --seed 11 --out {runs}/fp32"
)
QUANTIZE = (
    "quantize {runs}/fp32 --simulate --calibration arith --window 256 --out {runs}/{name} --scheme "
)
SCHEMES = {
    "w8a8-dynamic": "w8a8-dynamic",
    "w8a8-static": "w8a8-static",
    "w4a4": "w4a4",
    "w4a4-hadamard": "w4a4 --scheme-option rotation=hadamard",
}
COMMANDS = {"fp32": TRAIN} | {name: QUANTIZE + scheme for name, scheme in SCHEMES.items()}
EVALUATE = (
    "evaluate {runs}/{name} --tasks arith --limit 500 --batch-size 64 --out {runs}/{name}.json"
)
NAME = "arith.pass@1.strict"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, required=True)
    runs = parser.parse_args().runs
    metrics, intervals = [], {}
    for name, command in COMMANDS.items():
        for words, done in (
            (command, runs / name / "record.json"),
            (EVALUATE, runs / f"{name}.json"),
        ):
            if not done.exists():
                words = words.format(runs=runs, name=name).split()
                subprocess.run([sys.executable, "-m", "oasis_attn", *words], check=True)
        found = EvaluationRecord.load(runs / f"{name}.json")
        metrics.append(Metric(name=NAME, value=found[NAME], where=name, n=found.metric(NAME).n))
        intervals[name] = found.intervals[NAME]
    record = BenchmarkRecord(
        name="arith",
        data={"commands": [*COMMANDS.values(), EVALUATE]},
        seed=11,
        metrics=tuple(metrics),
        tables={"interval95": intervals},
    )
    record.save(RESULTS / "record.json")
    write_text(RESULTS / "table.md", markdown(table(record)))
    print(markdown(table(record)))


def table(record: BenchmarkRecord) -> Table:
    """A row a scheme."""
    rows = []
    for metric in record.metrics:
        low, high = record.tables["interval95"][metric.where]
        numbers = f"{metric.value:.1%}", f"{low:.1%} to {high:.1%}", str(metric.n)
        rows.append((metric.where, *numbers))
    columns = ("scheme", "Pass@1", "95 % interval", "n")
    return Table(title="", columns=columns, rows=tuple(rows), text_columns=1)


if __name__ == "__main__":
    main()
