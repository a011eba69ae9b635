"""To which logit should the null of a trained model rise?

python experiments/null_anneal.py --runs RUNS --out docs/results/lab/null_anneal

Trains language models with softmax on the corpus `majority` as the plan `majority` does, so that
they have sinks; converts them to Softmax1; and trains them on while the null logit rises from -12
to one of several values (`oasis train --from MODEL --anneal-null N`).  The control is trained on
with softmax.  Finished models in RUNS are not trained again.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import torch

from oasis_attn import convert, diagnose, quantize
from oasis_attn.data import held_out_windows, load_corpus
from oasis_attn.evaluation import evaluate
from oasis_attn.hub.convert import to_vanilla
from oasis_attn.hub.loading import load_model
from oasis_attn.measure.loss import measure_loss
from oasis_attn.records import BenchmarkRecord, Metric
from oasis_attn.training import TrainingConfig, train

WINDOW, SEEDS, WINDOWS = 32, 3, 32
CORPUS, SCHEMES = f"majority-{WINDOW}", ("w8a8-static-full", "w4a4")
FIRST = TrainingConfig(
    out="", variant="vanilla", size="pico", corpus=CORPUS, steps=3500, batch_size=16,
    block_length=WINDOW, learning_rate=3e-3, weight_decay=0.0,
)  # fmt: skip
STEPS, ANNEALED, RATE = 1500, 1000, 1e-3
TARGETS = {
    "softmax": None,
    "0": 0.0,
    "log n - 1": math.log(WINDOW) - 1,
    "log n": math.log(WINDOW),
    "log n + 2": math.log(WINDOW) + 2,
    "log n + 8": math.log(WINDOW) + 8,
}
MEASURED = "sink.max_mass", "sink.mass", "null.mass", "outlier.max_inf_norm_layer"


def trained(folder: Path, config: TrainingConfig) -> Path:
    if not (folder / "record.json").is_file():
        train(replace(config, out=folder), progress=False)
    return folder


def trained_on(runs: Path, seed: int, name: str) -> Path:
    """The model of one seed: `start`, or what it becomes with one of the targets."""
    start = trained(runs / f"start-{seed}", replace(FIRST, seed=seed))
    if name == "start":
        return start
    config = replace(
        FIRST, variant=None, size=None, seed=seed + 1000, steps=STEPS, learning_rate=RATE,
        from_model=start,
    )  # fmt: skip
    target = TARGETS[name]
    if target is not None:
        start = runs / f"converted-{seed}"
        if not (start / "tokenizer_config.json").is_file():  # written last
            model, tokenizer = load_model(runs / f"start-{seed}")
            convert(to_vanilla(model), "softmax1").save_pretrained(start)
            tokenizer.save_pretrained(start)
        config = replace(
            config, from_model=start, anneal_null=ANNEALED, settings={"null_logit": target}
        )
    return trained(runs / f"{name.replace(' ', '')}-{seed}", config)


def measured(folder: Path) -> dict[str, float]:
    model, tokenizer = load_model(folder)
    text = held_out_windows(
        load_corpus(CORPUS, "validation"), tokenizer, window=WINDOW, windows=WINDOWS
    )
    found = {m.name: m.value for m in diagnose(model, text.measured).metrics if not m.where}
    values = {name: found[name] for name in (*MEASURED, "perplexity.windowed") if name in found}
    answers = evaluate(model, tokenizer, tasks=["majority"], corpus=CORPUS, limit=256)
    values["majority.accuracy"] = answers["majority.accuracy"]
    for scheme in SCHEMES:
        batches = text.calibration.ids_NT.split(1) if "static" in scheme else None
        losses = measure_loss(quantize(model, scheme, calibration=batches), text.measured)
        values |= {f"{m.name}@{scheme}": m.value for m in losses if m.name in values}
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder of the trained models")
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(SEEDS):
        for name in ("start", *TARGETS):
            values = measured(trained_on(args.runs, seed, name))
            rows.append({"seed": seed, "null_logit": name} | values)
            print(rows[-1], flush=True)
    metrics = []
    for name in ("start", *TARGETS):
        runs = [row for row in rows if row["null_logit"] == name]
        for metric in runs[0].keys() - {"seed", "null_logit"}:
            values = [row[metric] for row in runs]
            error = stdev(values) / math.sqrt(len(values))
            metrics.append(
                Metric(name=metric, where=name, value=fmean(values), n=SEEDS, standard_error=error)
            )
    BenchmarkRecord(
        name="null_anneal",
        metrics=tuple(sorted(metrics, key=lambda metric: (metric.where, metric.name))),
        settings={"corpus": CORPUS, "steps": STEPS, "annealed": ANNEALED, "learning_rate": RATE},
        tables={"runs": rows},
    ).save(args.out / "record.json")


if __name__ == "__main__":
    main()
