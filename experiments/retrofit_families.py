"""Nulls from the sinks of small models of three families.

python experiments/retrofit_families.py --runs RUNS

Models are trained on texts of the corpus `majority`, which begin with BOS, until a sink forms on
BOS.  They get nulls without training, and are measured on the same texts with and without BOS.
RUNS has the models and the finished runs, which are not repeated.  Record and table are written to
docs/results/retrofit.
"""

from __future__ import annotations

import argparse
from functools import lru_cache, partial
from itertools import islice, product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, get_scheduler

from oasis_attn.data import as_windows
from oasis_attn.data.majority import QUESTION, MajorityTask
from oasis_attn.data.tokenizer import word_tokenizer
from oasis_attn.files import write_text
from oasis_attn.hub.null_from_sink import null_from_sink
from oasis_attn.hub.prefix import compute_prefix, with_prefix
from oasis_attn.lab.runs import Run, RunFile, rounded, run_in_processes
from oasis_attn.measure.sink_conversion import measure_sink
from oasis_attn.ops.token_losses import token_losses
from oasis_attn.quantization import quantize
from oasis_attn.records import BenchmarkRecord, Metric
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import Table

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "retrofit"
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gemma3_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 16, "query_pre_attn_scalar": 16,
    },
    "olmo2": {},
}  # fmt: skip
"""Norms before attention and MLP; before and after, with sliding windows; only after."""
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip
SEEDS = 3
TASK = MajorityTask(window=64)
WORDS = TASK.window - 2  # of a text
STEPS, BATCH = 250, 32
RATE, WARMUP, BETAS, MAX_NORM = 3e-3, 50, (0.9, 0.99), 1.0
MEASURED, CALIBRATION = 128, 64  # texts
SCHEME = "w8a8-static-linear"

ORIGINAL, FROM_WORDS, FROM_BOS, PREFIX = (
    "original",
    "null from words",
    "null from BOS",
    "prefix BOS",
)
CASES = (
    (ORIGINAL, True), (ORIGINAL, False), (FROM_WORDS, True), (FROM_BOS, True), (FROM_BOS, False),
    (PREFIX, False),
)  # fmt: skip
"""Models, and whether their texts begin with BOS; first the model and the texts of the training."""
COLUMNS = {
    "retrofit.perplexity_ratio": "perplexity / that as trained",
    "retrofit.accuracy": "right answers",
    "sink.max_mass": "first token",
    "null.max_mass": "null",
    "outlier.max_activation": "largest activation",
    f"retrofit.perplexity_ratio@{SCHEME}": f"{SCHEME} / float",
}
SPREAD = ("retrofit.perplexity_ratio", "sink.max_mass")


class Unit(NamedTuple):
    """A model."""

    family: str
    seed: int


def missing(file: RunFile) -> list[Unit]:
    """What is to be run, the first seeds first."""
    done = {(row["group"], row["seed"]) for row in file.rows}
    units = (Unit(family, seed) for seed in range(SEEDS) for family in FAMILIES)
    return [unit for unit in units if unit not in done]


@lru_cache(maxsize=1)
def texts(seed: int) -> list[Tensor]:
    """Texts [N, T] with BOS and EOS: to measure, to calibrate, and to train."""
    ids = word_tokenizer(TASK.vocabulary).get_vocab()
    parts = MEASURED, CALIBRATION, STEPS * BATCH
    rows = (
        [ids["<s>"], *map(ids.__getitem__, text.split()), ids["</s>"]]
        for text in TASK.documents(seed)
    )
    return list(torch.tensor(list(islice(rows, sum(parts)))).split(parts))


def run(unit: Unit, folder: Path) -> Run:
    """Train a model, unless it is in `folder`, and measure its `CASES`."""
    measured_NT, seen_NT, train_NT = texts(unit.seed)
    path = folder / f"{unit.family}-{unit.seed}"
    if path.exists():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path)
    else:
        model = new_model(unit)
        train(model, train_NT)
        model.save_pretrained(path)
    cases = measure_cases(model.eval(), measured_NT, seen_NT)
    return {"group": unit.family, "seed": unit.seed, "cases": cases}


def new_model(unit: Unit) -> PreTrainedModel:
    """A model with random weights."""
    ids = word_tokenizer(TASK.vocabulary)
    config = AutoConfig.for_model(
        unit.family, vocab_size=len(ids), max_position_embeddings=TASK.window, pad_token_id=None,
        bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id,
        **SIZES | FAMILIES[unit.family],
    )  # fmt: skip
    torch.manual_seed(unit.seed)
    return AutoModelForCausalLM.from_config(config)


def train(model: PreTrainedModel, ids_NT: Tensor) -> None:
    """Train in place, on each text once."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=BETAS, fused=True)
    schedule = get_scheduler("constant_with_warmup", optimizer, WARMUP)
    for ids_BT in ids_NT.split(BATCH):
        losses_BT = token_losses(model(input_ids=ids_BT, use_cache=False).logits, ids_BT)
        losses_BT.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def measure_cases(model: PreTrainedModel, ids_NT: Tensor, seen_NT: Tensor) -> list[dict[str, Any]]:
    """The metrics of `CASES`, on texts without EOS.

    Models learn at which position EOS is; without BOS, the position is another.
    """
    ids_NT, seen_NT = ids_NT[:, :-1], seen_NT[:, :-1]
    models = {
        ORIGINAL: model,
        FROM_WORDS: null_from_sink(model, seen_NT[:, 1:]).model,
        FROM_BOS: null_from_sink(model, seen_NT[:, 1:], first_token=int(seen_NT[0, 0])).model,
        PREFIX: with_prefix(model, compute_prefix(model, seen_NT[0, :1].tolist())),
    }
    found: list[dict[str, Any]] = []
    for name, with_bos in CASES:
        begin = 0 if with_bos else 1
        each = measure(models[name], ids_NT[:, begin:], seen_NT[:, begin:])
        first = found[0] if found else each
        ratio = each["retrofit.perplexity"] / first["retrofit.perplexity"]
        found.append(each | {"retrofit.perplexity_ratio": ratio})
    return [{name: rounded(value) for name, value in each.items()} for each in found]


def measure(model: PreTrainedModel, ids_NT: Tensor, seen_NT: Tensor) -> dict[str, float]:
    """Metrics of a model on texts; `seen_NT` calibrates its quantization."""
    windows = as_windows(ids_NT, tokenizer=None, window=None, windows=MEASURED, vocab_size=2**31)
    metrics, tables = measure_sink(model, windows)
    found = {metric.name: metric.value for metric in metrics}
    asked_NT = ids_NT[:, :-1] == word_tokenizer(TASK.vocabulary).get_vocab()[QUESTION]
    logits_NTV, plain = logits_and_perplexity(model, ids_NT)
    right_NT = logits_NTV[:, :-1].argmax(-1) == ids_NT[:, 1:]
    quantized = quantize(model, SCHEME, calibration=seen_NT.split(16))
    return {
        "retrofit.perplexity": plain,
        "retrofit.accuracy": float(right_NT[asked_NT].float().mean()),
        "sink.max_mass": found["sink.max_mass"],
        "null.max_mass": max(map(max, tables.get("null.mass", [[0.0]]))),
        "outlier.max_activation": found["outlier.max_activation"],
        f"retrofit.perplexity_ratio@{SCHEME}": logits_and_perplexity(quantized, ids_NT)[1] / plain,
    }


@torch.no_grad()
def logits_and_perplexity(model: PreTrainedModel, ids_NT: Tensor) -> tuple[Tensor, float]:
    """The perplexity is that of all words but the first, with and without BOS."""
    logits_NTV = model(input_ids=ids_NT, use_cache=False).logits
    return logits_NTV, float(token_losses(logits_NTV, ids_NT)[:, 1 - WORDS :].mean().exp())


def make_record(file: RunFile) -> BenchmarkRecord:
    """Means over seeds; the values of the seeds are in the table `runs`."""
    metrics, rows = [], []
    for family, (index, (name, with_bos)) in product(FAMILIES, enumerate(CASES)):
        found = [row["cases"][index] for row in file.of(family)]
        values = {metric: [each[metric] for each in found] for metric in found[0]}
        rows.append({"family": family, "model": name, "bos": with_bos} | values)
        where = f"{family} / {name}, {'with' if with_bos else 'without'} BOS"
        metrics += [
            Metric(name=metric, where=where, value=fmean(each), n=len(each))
            for metric, each in values.items()
        ]
    settings = {"families": FAMILIES, "sizes": SIZES, "steps": STEPS, "batch_size": BATCH}
    data = {"texts": f"majority, {MEASURED} to measure and {CALIBRATION} to calibrate, for a seed"}
    return BenchmarkRecord(
        name="retrofit_families", settings=settings | {"learning_rate": RATE}, data=data,
        metrics=tuple(metrics), tables={"runs": rows},
    )  # fmt: skip


def table(record: Any) -> str:
    """A Markdown table: means over seeds; for some also the smallest and the largest value."""

    def cell(name: str, values: list[float]) -> str:
        spread = f" ({min(values):.3f} to {max(values):.3f})" if name in SPREAD else ""
        return f"{fmean(values):.3f}{spread}"

    rows = tuple(
        (
            row["family"],
            row["model"],
            "with" if row["bos"] else "without",
            *(cell(name, row[name]) for name in COLUMNS),
        )
        for row in record.tables["runs"]
    )
    heads = ("family", "model", "BOS", *COLUMNS.values())
    return markdown(Table(columns=heads, rows=rows, text_columns=3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder of models and runs")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (2)")
    options = parser.parse_args()
    file = RunFile(options.runs / "runs.jsonl")
    run_in_processes(file, missing, partial(run, folder=options.runs), workers=options.workers)
    record = make_record(file)
    record.save(RESULTS / "families.json")
    write_text(RESULTS / "families.md", table(record))


if __name__ == "__main__":
    main()
