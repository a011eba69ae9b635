"""The sink of SmolLM2 becomes a null: without training, and after training on two budgets.

python experiments/retrofit_training.py run --null ONE --nulls SIX --corpus FOLDER --runs RUNS
python experiments/retrofit_training.py table --runs RUNS

`run` trains every row of `ROWS` that trains, measures every row, and writes RUNS/records/ROW.json
as soon as a row is finished.  A row that has a record is skipped, and a training that was
interrupted is resumed.  The rows run side by side, as new processes, `--jobs` at a time; none needs
another.  `table` writes docs/results/retrofit from the records; rows without one stay as they are.

ONE is made by `oasis convert smollm2 --null-from-sink --calibration wikitext-2 --calibration-split
validation --out ONE`, and SIX with `--nulls 6 --prune-neurons 6` too.  `corpus` makes FOLDER, the
training text: GSM8K train and film reviews.  Each budget has four rows with the same tokens and the
same optimizer: the converted and the unconverted model, on the divergence from the original model
(the former from ONE), and on the next-token loss (the former from SIX).  All have the outlier
penalty, except the unconverted model on the next-token loss, as its owner trains it.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import hashlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from oasis_attn.files import write_text
from oasis_attn.records import BenchmarkRecord
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import Table, number
from oasis_attn.training import TrainingConfig

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "retrofit"
REVIEWS = 8000  # film reviews in the training text; GSM8K has 7473 problems

COMMON: dict[str, Any] = {
    "block_length": 256,
    "trainable": ["model.layers.*", "model.norm.*"],
    "log_every": 20,
    "eval_windows": 16,
}
SHORT = COMMON | {"steps": 400, "batch_size": 2, "learning_rate": 1e-4, "save_every": 200}
"""205 thousand tokens: 20 minutes on two cores."""
LONG = COMMON | {
    "steps": 400,
    "batch_size": 8,
    "learning_rate": 2e-4,
    "save_every": 100,
    "bf16": True,
}
"""819 thousand tokens, four times as many: an hour on one core that multiplies in bfloat16."""
ROAD_SHARE = 0.6  # of the steps, until the keys and values of nulls are 0


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """The outlier penalty of a training: its weight, and what it reads."""

    weight: float
    tensors: str = "layer_outputs"


CHOSEN = Penalty(weight=0.03)
"""The penalty of the recipe; the others show what it does."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model of the comparison.

    Attributes:
        label: what the table calls it.
        start: the model it starts from, `original`, `null` or `nulls` (several nulls per head).
        budget: the training; None without training.
        penalty: the outlier penalty; None without one.
        distill: whether the loss is the divergence from the original model, and not the next-token
            loss.
    """

    label: str
    start: str
    budget: dict[str, Any] | None = None
    penalty: Penalty | None = None
    distill: bool = True

    def options(self) -> dict[str, Any]:
        """The options of the training, without models and folders."""
        assert self.budget is not None
        options = dict(self.budget)
        if self.penalty is not None and self.penalty.weight:
            options["outlier_penalty"] = self.penalty.weight
            options["outlier_tensors"] = self.penalty.tensors
        if self.distill:
            options["distill_from"] = "original"
        if self.start != "original":
            options["null_to_logit"] = round(ROAD_SHARE * options["steps"])
        return options


def _rows(budget: dict[str, Any], name: str, others: dict[str, Penalty]) -> dict[str, Row]:
    """The rows of a budget: the recipe, equal training of the original, and other penalties."""
    trained = {
        f"{name}-null": Row(
            label=f"plain null, {name}", start="null", budget=budget, penalty=CHOSEN
        ),
        f"{name}-null-next-token": Row(
            label=f"plain null, {name}, next-token loss",
            start="nulls", budget=budget, penalty=CHOSEN, distill=False,
        ),
        f"{name}-original": Row(
            label=f"original, {name}, next-token loss",
            start="original", budget=budget, distill=False,
        ),
        f"{name}-original-same-loss": Row(
            label=f"original, {name}, same loss", start="original", budget=budget, penalty=CHOSEN
        ),
    }  # fmt: skip
    for key, penalty in others.items():
        label = f"plain null, {name}, penalty {penalty.weight:g} on {penalty.tensors}"
        trained[f"{name}-null-{key}"] = Row(
            label=label if penalty.weight else f"plain null, {name}, no penalty",
            start="null", budget=budget, penalty=penalty,
        )  # fmt: skip
    return trained


ROWS = (
    _rows(LONG, "long", {"0.1": Penalty(weight=0.1)})
    | _rows(
        SHORT,
        "short",
        {
            "0.3": Penalty(weight=0.3),
            "0.1": Penalty(weight=0.1),
            "inputs-0.3": Penalty(weight=0.3, tensors="linear_inputs"),
            "none": Penalty(weight=0.0),
        },
    )
    | {
        "original": Row(label="original", start="original"),
        "null": Row(label="one null with key and value", start="null"),
        "nulls": Row(label="six nulls with keys and values, pruned", start="nulls"),
    }
)
"""In the order in which they start: the longest first."""

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "w8a8-static-linear": ("w8a8-static-linear", {}),
    "w8a8-static-linear, per channel, percentile": (
        "w8a8-static-linear", {"weight.granularity": "channel", "observer": "percentile"}
    ),
    "w8a8-static-full": ("w8a8-static-full", {}),
    "w4a4": ("w4a4", {}),
    "w4a4, Hadamard": ("w4a4", {"rotation": "hadamard"}),
    "w4a4, GPTQ": ("w4a4", {"rounding": "gptq"}),
    "w4a4, Hadamard, GPTQ": ("w4a4", {"rotation": "hadamard", "rounding": "gptq"}),
}  # fmt: skip
TEXTS = ("wikitext-2", "gsm8k")
PERPLEXITY, LIKELIHOOD = "perplexity.windowed", "gsm8k.answer_loglik"
LAYER_SINK = "sink.max_layer_mass"
OUTLIERS = ("outlier.max_inf_norm_layer", "outlier.avg_kurtosis")


def make_corpus(folder: Path) -> None:
    """Write the training text: documents of GSM8K and of film reviews, in the order of a hash."""
    from oasis_attn.data import load_corpus

    texts = [
        *load_corpus("gsm8k").texts(),
        *islice(load_corpus("imdb").texts(), REVIEWS),
    ]
    texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    held_out = list(load_corpus("wikitext-2", "validation").texts())
    folder.mkdir(parents=True)
    for split, documents in (("train", texts), ("validation", held_out)):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents)


def train_row(row: Row, args: argparse.Namespace) -> Path | str:
    """The folder of the row's model, which is trained if that is not done yet."""
    import torch

    from oasis_attn.training import train

    if row.budget is None:
        return start_of(row, args)
    config = training_config(args.row, args)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs; no effect on CPUs
    train(config, progress=False)
    torch.set_float32_matmul_precision("highest")
    gc.collect()
    torch.cuda.empty_cache()
    return Path(config.out)


def start_of(row: Row, args: argparse.Namespace) -> str:
    """The model that a row starts from."""
    start: str = {"original": args.model, "null": args.null, "nulls": args.nulls}[row.start]
    return start


def training_config(name: str, args: argparse.Namespace) -> TrainingConfig:
    """The training of a row; a run that exists is resumed."""
    row, out = ROWS[name], args.runs / name
    options = row.options()
    if "distill_from" in options:
        options["distill_from"] = args.model
    if args.small:
        options |= {"steps": 10, "save_every": 5, "log_every": 5, "eval_windows": 1}
        options |= {"batch_size": 1, "block_length": 32}
        options |= {"null_to_logit": 6} if "null_to_logit" in options else {}
    return TrainingConfig(
        out=out, from_model=start_of(row, args), corpus=args.corpus,
        resume=(out / "run.json").exists(), seed=args.seed, **options,
    )  # fmt: skip


def measure_row(row: Row, args: argparse.Namespace) -> None:
    """Train and measure one row; its record is saved after each measurement."""
    import torch

    from oasis_attn import diagnose, quantize
    from oasis_attn.data import load_corpus, read_windows
    from oasis_attn.evaluation import evaluate
    from oasis_attn.hub.loading import load_model
    from oasis_attn.measure.loss import measure_loss
    from oasis_attn.quantization.schemes import get_scheme
    from oasis_attn.records import Metric, TrainingRecord

    begin = time.perf_counter()
    folder = train_row(row, args)
    trained = time.perf_counter() - begin
    model, tokenizer = load_model(folder)
    model.to(args.device)
    length, count = (64, 2) if args.small else (512, 32)

    def windows(corpus: str, split: str, count: int = count) -> Any:
        return read_windows(load_corpus(corpus, split), tokenizer, window=length, windows=count)

    record = BenchmarkRecord(
        name="retrofit",
        settings={
            "row": args.row,
            "label": row.label,
            "training": None if row.budget is None else row.options(),
            "small": args.small,
            "device": args.device,
            "finished": False,
        },
        data={
            "training": "GSM8K train and film reviews",
            "evaluation": f"test splits, {count} x {length} tokens spread over the text, documents"
            " joined by EOS; calibration: WikiText-2 validation, 16 windows",
        },
        seed=args.seed,
        tables={"seconds": {"training": trained}},
    )
    if row.budget is not None:
        record.tables["loss"] = TrainingRecord.load(Path(folder, "record.json")).tables["loss"]

    def add(*metrics: Metric) -> None:
        nonlocal record
        record = replace(record, metrics=(*record.metrics, *metrics))
        record.save(args.runs / "records" / f"{args.row}.json")

    texts = {name: windows(name, "test") for name in TEXTS}
    for name, read in texts.items():
        found = diagnose(model, read, batch_size=8)
        mass_L = torch.tensor(found.tables["sink.mass"]).mean(-1)
        metrics = [found.metric(each) for each in (PERPLEXITY, *OUTLIERS)]
        metrics.append(Metric(name=LAYER_SINK, value=float(mass_L.max()), n=metrics[0].n))
        record.tables[f"sink.mass, {name}"] = mass_L.tolist()
        record.tables[f"outlier.inf_norm_layer, {name}"] = found.tables["outlier.inf_norm_layer"]
        add(*(replace(metric, where=name) for metric in metrics))
    scored = evaluate(
        model, tokenizer, tasks=["gsm8k-loglik"], limit=4 if args.small else 256, batch_size=16
    )
    add(scored.metric(LIKELIHOOD))
    calibration = windows("wikitext-2", "validation", min(count, 16)).ids_NT
    failed = []
    for label, (name, options) in SCHEMES.items():
        scheme = get_scheme(name).with_options(options)
        batches = calibration.split(4) if scheme.needs_calibration else None
        try:
            quantized = quantize(model, scheme, calibration=batches)
            found = [measure_loss(quantized, read, batch_size=8)[0] for read in texts.values()]
        except (RuntimeError, ValueError) as error:  # the other schemes are still of use
            failed.append(f"{label}: {error}")
            continue
        add(
            *(
                replace(metric, where=f"{text}, {label}")
                for text, metric in zip(texts, found, strict=True)
            )
        )
    record.tables["seconds"]["all"] = time.perf_counter() - begin
    record.settings["finished"] = not failed
    add()
    if failed:
        sys.exit("\n".join(failed))


def is_finished(path: Path, small: bool) -> bool:
    """Whether a row has a complete record, of tiny sizes if `small`."""
    if not path.is_file():
        return False
    settings = json.loads(path.read_text())["settings"]
    if settings["small"] != small:
        sys.exit(f"{path} was measured with{'' if settings['small'] else 'out'} --small")
    return settings["finished"]


def run(args: argparse.Namespace) -> None:
    """Run the rows that have no record, each in a new process."""
    records = args.runs / "records"
    records.mkdir(parents=True, exist_ok=True)
    names = args.rows.split(",") if args.rows else list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        sys.exit(f"--rows: {unknown[0]!r} is none of {', '.join(ROWS)}")
    if args.nulls is None:
        names = [name for name in names if ROWS[name].start != "nulls"]
    waiting = [n for n in names if not is_finished(records / f"{n}.json", args.small)]
    for name in waiting:  # wrong options are refused before any work
        if ROWS[name].budget is not None:
            training_config(name, args)
    running: dict[str, subprocess.Popen[bytes]] = {}
    begin = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - begin:6.0f} s  {what}", flush=True)

    failed = []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            name = waiting.pop(0)
            say(f"start {name}")
            with (args.runs / f"{name}.log").open("ab") as log:
                running[name] = subprocess.Popen(
                    [sys.executable, __file__, "row", name, *args.passed_on],
                    stdout=log, stderr=subprocess.STDOUT,
                )  # fmt: skip
        time.sleep(0.5)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                say(f"{'done' if process.returncode == 0 else 'FAILED'} {name}")
                failed += [name] if process.returncode else []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see the logs in {args.runs}")


MEASURED = (
    *((metric, text) for text in TEXTS for metric in (PERPLEXITY, LAYER_SINK, *OUTLIERS)),
    (LIKELIHOOD, ""),
)


def publish(folder: Path) -> None:
    """Write the record and the table of all rows: those of `folder`, and those published before."""
    path = RESULTS / "training.json"
    published = BenchmarkRecord.load(path) if path.is_file() else None
    records = {
        name: BenchmarkRecord.load(path)
        for name in ROWS
        if (path := folder / f"{name}.json").is_file()
    }
    if not records:
        sys.exit(f"{folder} has no record")
    settings = {name: record.settings["training"] for name, record in records.items()}
    tables = {name: record.tables for name, record in records.items()}
    metrics = [
        replace(metric, where=f"{name} / {metric.where}".removesuffix(" / "))
        for name, record in records.items()
        for metric in record.metrics
    ]
    if published is not None:
        settings, tables = published.settings | settings, published.tables | tables
        metrics += [m for m in published.metrics if m.where.partition(" / ")[0] not in records]
    names = sorted(settings, key=_order)
    metrics.sort(key=lambda metric: names.index(metric.where.partition(" / ")[0]))
    merged = replace(
        next(iter(records.values())),
        name="retrofit_training",
        settings={name: settings[name] for name in names},
        metrics=tuple(metrics),
        tables={name: tables[name] for name in names},
    )
    merged.save(RESULTS / "training.json")
    write_text(RESULTS / "training.md", table(merged))


def _order(name: str) -> tuple[int, int]:
    budget = ROWS[name].budget
    tokens = 0 if budget is None else budget["steps"] * budget["batch_size"]
    return tokens, list(ROWS).index(name)


def table(record: Any) -> str:
    """A Markdown table: one row per metric, one column per model; empty if not measured."""
    found = {(metric.name, metric.where): metric.value for metric in record.metrics}
    lines = {f"`{metric}`{text and f', {text}'}": (metric, text) for metric, text in MEASURED}
    for text in TEXTS:
        for scheme in SCHEMES:
            lines[f"perplexity, {text}, {scheme}"] = PERPLEXITY, f"{text}, {scheme}"

    def cell(name: str, metric: str, where: str) -> str:
        value = found.get((metric, f"{name} / {where}" if where else name))
        return "" if value is None else number(value)

    return markdown(
        Table(
            columns=("", *(ROWS[name].label for name in record.settings)),
            rows=tuple(
                (line, *(cell(name, *place) for name in record.settings))
                for line, place in lines.items()
            ),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="write the training text")
    corpus.add_argument("folder", type=Path)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", default="smollm2", help="the original model")
    common.add_argument("--null", required=True, help="the converted model with one null")
    common.add_argument("--nulls", help="the converted model with several nulls")
    common.add_argument("--corpus", required=True, help="folder of the training text")
    common.add_argument("--runs", type=Path, required=True, help="folder of models and records")
    common.add_argument("--device", default="cpu")
    common.add_argument("--seed", type=int, default=0, help="of the order of the training text")
    common.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    every = commands.add_parser("run", parents=[common], help="train and measure all rows")
    every.add_argument("--rows", help="names, separated by commas; default: all")
    every.add_argument("--jobs", type=int, default=1, help="rows at a time")
    one = commands.add_parser("row", parents=[common], help="train and measure one row")
    one.add_argument("row", choices=list(ROWS))
    table = commands.add_parser("table", help="write docs/results/retrofit")
    table.add_argument("--runs", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "corpus":
        make_corpus(args.folder)
    elif args.command == "row":
        measure_row(ROWS[args.row], args)
    elif args.command == "table":
        publish(args.runs / "records")
    else:
        args.passed_on = ["--model", args.model, "--null", args.null, "--corpus", args.corpus]
        args.passed_on += [
            "--runs",
            str(args.runs),
            "--device",
            args.device,
            "--seed",
            str(args.seed),
            *(["--small"] if args.small else []),
        ]
        args.passed_on += ["--nulls", args.nulls] if args.nulls else []
        run(args)


if __name__ == "__main__":
    main()
