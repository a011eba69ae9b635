"""When do massive activations form in language models of real text?

python experiments/language_models.py corpus FOLDER
python experiments/language_models.py run NAME --corpus FOLDER --runs RUNS
python experiments/language_models.py record --runs RUNS

`run` trains one of the models of `RUNS`, all with softmax attention, and measures sinks,
activations and quantization on held-out text; four at once take five minutes on an H100 GPU.
`record` collects what `run` wrote in docs/results/lab/language_models.  FOLDER is film reviews,
Python code and GSM8K: 18 million tokens.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from oasis_attn.records import BenchmarkRecord, Metric

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "lab" / "language_models"
TEXTS = {"train": ("imdb", "stdlib", "gsm8k"), "validation": ("imdb", "stdlib")}
VOCABULARY, WINDOWS = 8192, 32
SCHEMES = ("w8a8-static-full", "w8a8-static-linear", "w8a8-dynamic", "w4a4")


@dataclass(frozen=True)
class Run:
    """One model: whether windows begin with BOS, and how it is trained."""

    size: str
    bos: bool
    steps: int
    learning_rate: float
    batch_size: int = 64
    block_length: int = 256
    seed: int = 0


RUNS = {
    "nano": Run("nano", bos=False, steps=3000, learning_rate=4e-3),
    "micro": Run("micro", bos=False, steps=3000, learning_rate=2e-3),
    "mini": Run("mini", bos=False, steps=2000, learning_rate=1e-3),
    "mini, BOS": Run("mini", bos=True, steps=2000, learning_rate=1e-3),
}


def make_corpus(folder: Path) -> None:
    """Write the text, its documents in the order of a hash."""
    from oasis_attn.data import load_corpus

    folder.mkdir(parents=True)
    for split, names in TEXTS.items():
        texts = [text for name in names for text in load_corpus(name, split).texts()]
        texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def train_model(run: Run, corpus: Path, folder: Path) -> Any:
    """Train the model of a run in `folder`; its record."""
    import torch

    from oasis_attn.data import corpus_tokenizer, load_corpus
    from oasis_attn.hub.model_sizes import text_config
    from oasis_attn.hub.tokenizer_bos import without_bos
    from oasis_attn.modeling.variants import settings_of
    from oasis_attn.training import TrainingConfig, train
    from oasis_attn.training.model import build_model

    tokenizer: Any = corpus_tokenizer(load_corpus(corpus), VOCABULARY)
    backbone = text_config(run.size, VOCABULARY)
    backbone.bos_token_id, backbone.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    backbone.pad_token_id = None
    if not run.bos:
        tokenizer = without_bos(tokenizer, tokenizer.bos_token_id)
    start = folder / "start"
    build_model(backbone, settings_of("vanilla"), run.seed).save_pretrained(start)
    tokenizer.save_pretrained(start)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs; no effect on CPUs
    record = train(
        TrainingConfig(
            out=folder / "trained", from_model=start, corpus=str(corpus), steps=run.steps,
            seed=run.seed, block_length=run.block_length, batch_size=run.batch_size,
            learning_rate=run.learning_rate, bf16=True, log_every=50, save_every=run.steps,
            eval_windows=WINDOWS,
        )
    )  # fmt: skip
    torch.set_float32_matmul_precision("highest")
    return record


def measure_run(name: str, corpus: Path, runs: Path) -> None:
    """Train and measure one model, and write its record."""
    from oasis_attn import diagnose, quantize
    from oasis_attn.data import held_out_windows, load_corpus
    from oasis_attn.hub.loading import load_model
    from oasis_attn.measure.loss import measure_loss
    from oasis_attn.quantization import schemes

    run, folder = RUNS[name], runs / name.replace(", ", "-")
    trained = train_model(run, corpus, folder)
    model, tokenizer = load_model(folder / "trained", device="auto")
    text = held_out_windows(
        load_corpus(corpus, "validation"), tokenizer, window=run.block_length, windows=WINDOWS
    )
    found = diagnose(model, text.measured)
    metrics = [trained.metric("training.loss"), *(m for m in found.metrics if not m.where)]
    for scheme in SCHEMES:
        needed = schemes()[scheme].needs_calibration
        batches = text.calibration.ids_NT.split(4) if needed else None
        losses = measure_loss(quantize(model, scheme, calibration=batches), text.measured)
        metrics += [replace(metric, name=f"{metric.name}@{scheme}") for metric in losses]
    tables = {
        "sink.mass": [fmean(heads) for heads in found.tables["sink.mass"]],
        "outlier.inf_norm_layer": found.tables["outlier.inf_norm_layer"],
    }
    BenchmarkRecord(
        name="language_models",
        settings={name: asdict(run)},
        metrics=tuple(replace(metric, where=name) for metric in metrics),
        tables={name: tables},
        environment=found.environment,
    ).save(folder / "record.json")


def publish(runs: Path) -> None:
    """Collect the records of all runs in one."""
    records = [
        BenchmarkRecord.load(path)
        for name in RUNS
        if (path := runs / name.replace(", ", "-") / "record.json").is_file()
    ]
    settings: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    metrics: list[Metric] = []
    for record in records:
        settings |= record.settings
        tables |= record.tables
        metrics += record.metrics
    merged = replace(records[0], settings=settings, metrics=tuple(metrics), tables=tables)
    merged.save(RESULTS / "record.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="write the text")
    corpus.add_argument("folder", type=Path)
    run = commands.add_parser("run", help="train and measure one model")
    run.add_argument("name", choices=list(RUNS))
    run.add_argument("--corpus", type=Path, required=True, help="folder of the text")
    record = commands.add_parser("record", help="collect the records")
    for command in (run, record):
        command.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    args = parser.parse_args()
    if args.command == "corpus":
        make_corpus(args.folder)
    elif args.command == "run":
        measure_run(args.name, args.corpus, args.runs)
    else:
        publish(args.runs)


if __name__ == "__main__":
    main()
