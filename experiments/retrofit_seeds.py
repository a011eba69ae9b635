"""The comparison of `retrofit_training.py` over several seeds, on one GPU.

python experiments/retrofit_seeds.py run --null CONVERTED --corpus FOLDER --runs RUNS
python experiments/retrofit_seeds.py table --runs RUNS

The null, and the two ways to train the model without one, on both budgets.  A seed decides the
order of the training text; RUNS/seed-N has the models and records of seed N.  `run` continues where
it was stopped; `table` writes docs/results/retrofit/seeds.{json,md} from the records: the mean over
the seeds, and in parentheses the smallest and the largest value.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from retrofit_training import MEASURED, PERPLEXITY, RESULTS, ROWS, SCHEMES, TEXTS, is_finished

from oasis_attn.files import write_text
from oasis_attn.records import BenchmarkRecord
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import ABSENT, Table, number

NAMES = tuple(
    f"{budget}-{way}"
    for budget in ("long", "short")
    for way in ("null", "original-same-loss", "original")
)
SEEDS = (1, 2, 3)


def run(args: argparse.Namespace) -> None:
    """Train and measure every row with every seed, `--jobs` at a time."""
    waiting = []
    for name in NAMES:
        for seed in SEEDS:
            folder = args.runs / f"seed-{seed}"
            (folder / "records").mkdir(parents=True, exist_ok=True)
            if not is_finished(folder / "records" / f"{name}.json", args.small):
                waiting.append((name, seed, folder))
    script = Path(__file__).with_name("retrofit_training.py")
    running: dict[str, subprocess.Popen[bytes]] = {}
    begin, failed = time.perf_counter(), []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            name, seed, folder = waiting.pop(0)
            options = {
                "model": args.model, "null": args.null, "corpus": args.corpus, "runs": folder,
                "device": args.device, "seed": seed,
            }  # fmt: skip
            passed = [str(x) for key, value in options.items() for x in (f"--{key}", value)]
            passed += ["--small"] if args.small else []
            with (folder / f"{name}.log").open("ab") as log:
                running[f"{name}, seed {seed}"] = subprocess.Popen(
                    [sys.executable, str(script), "row", name, *passed],
                    stdout=log, stderr=subprocess.STDOUT,
                )  # fmt: skip
        time.sleep(0.5)
        for label, process in list(running.items()):
            if process.poll() is not None:
                del running[label]
                done = "FAILED" if process.returncode else "done"
                print(f"{time.perf_counter() - begin:6.0f} s  {done} {label}", flush=True)
                failed += [label] if process.returncode else []
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}; see the logs in {args.runs}")


def publish(runs: Path) -> None:
    """Write the record of all rows and seeds, and its table."""
    records = {
        (name, seed): BenchmarkRecord.load(path)
        for name in NAMES
        for seed in SEEDS
        if (path := runs / f"seed-{seed}" / "records" / f"{name}.json").is_file()
    }
    if not records:
        sys.exit(f"{runs} has no records")
    metrics = [
        replace(metric, where=f"{name}, seed {seed} / {metric.where}".removesuffix(" / "))
        for (name, seed), record in records.items()
        for metric in record.metrics
    ]
    merged = replace(
        next(iter(records.values())),
        name="retrofit_seeds",
        settings={name: record.settings["training"] for (name, _), record in records.items()},
        seed=None,
        metrics=tuple(metrics),
        tables={f"{name}, seed {seed}": record.tables for (name, seed), record in records.items()},
    )
    merged.save(RESULTS / "seeds.json")
    write_text(RESULTS / "seeds.md", table(merged))


def table(record: BenchmarkRecord) -> str:
    """A Markdown table: one row per metric, one column per row of the comparison."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for metric in record.metrics:
        who, _, where = metric.where.partition(" / ")
        name = who.partition(", seed ")[0]
        found.setdefault((metric.name, name, where), []).append(metric.value)
    lines = {f"`{metric}`{text and f', {text}'}": (metric, text) for metric, text in MEASURED}
    for text in TEXTS:
        for scheme in SCHEMES:
            lines[f"perplexity, {text}, {scheme}"] = PERPLEXITY, f"{text}, {scheme}"
    names = [name for name in NAMES if name in record.settings]

    def cell(metric: str, name: str, where: str) -> str:
        values = found.get((metric, name, where), [])
        if not values:
            return ABSENT
        mean = sum(values) / len(values)
        return f"{number(mean)} ({number(min(values))} to {number(max(values))})"

    return markdown(
        Table(
            columns=("", *(ROWS[name].label for name in names)),
            rows=tuple(
                (line, *(cell(metric, name, where) for name in names))
                for line, (metric, where) in lines.items()
            ),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    every = commands.add_parser("run", help="train and measure all rows with all seeds")
    every.add_argument("--model", default="smollm2", help="the original model")
    every.add_argument("--null", required=True, help="the converted model with one null")
    every.add_argument("--corpus", required=True, help="folder of the training text")
    every.add_argument("--device", default="cuda")
    every.add_argument("--jobs", type=int, default=1, help="rows at a time")
    every.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    for command in (every, commands.add_parser("table", help="write docs/results/retrofit")):
        command.add_argument("--runs", type=Path, required=True, help="folder of all runs")
    args = parser.parse_args()
    publish(args.runs) if args.command == "table" else run(args)


if __name__ == "__main__":
    main()
