"""The law of the null in small language models.

python experiments/null_law_cells.py --out docs/results/lab/null_law_cells --workers 2

Trains decoders of 4 layers on the corpus `majority` with windows of 128, 256 and 512 tokens, with
constant null logits around the log of the window n, and with a null key (`key_null`).  With 512
tokens, no sink forms in this time; it does after a training with windows of 128 tokens of other
documents.

Finished runs are in OUT/runs.jsonl.gz and are not repeated; with --minutes, it stops in time and
can be resumed.  The record and the tables are made from this file; with --report, nothing is
trained.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice, product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig

from oasis_attn.data.majority import QUESTION, MajorityTask
from oasis_attn.data.tokenizer import word_tokenizer
from oasis_attn.files import write_text
from oasis_attn.lab.runs import Run, RunFile, rounded, run_in_processes
from oasis_attn.modeling.attention import AttentionCall, observe_attention
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.modeling.variants import settings_of
from oasis_attn.records import BenchmarkRecord, Metric
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import ABSENT, Table
from oasis_attn.training.parameters import group_of

OFFSETS = {"log n - 1.5": -1.5, "log n": 0.0, "log n + 2": 2.0}  # of constant logits
KEY, KEY_OFFSET, KEY_RATE = "key, log n + 0.5", 0.5, 0.1  # learning rate of the null's parameters
FEW_NULLS = None, "log n + 2", KEY  # None: softmax
NULLS = *FEW_NULLS, "0", "log n", "log n - 1.5"
RESIDUALS = {"sum": ("vanilla", "softmax1"), "depth": ("attn_residual", "oasis")}
WIDTH, HEADS, LAYERS = 64, 4, 4
RATE, WARMUP, BETAS, MAX_NORM = 3e-3, 100, (0.9, 0.99), 1.0
HELD_OUT = 2**17  # tokens
_LOGGED = 20


@dataclass(frozen=True)
class Stage:
    """A part of a training, with windows of one length."""

    window: int
    steps: int
    tokens: int  # of a step
    part: int = 0  # of the documents; windows of two lengths share text within one part


@dataclass(frozen=True)
class Cell:
    """Runs that are trained in the same stages and measured on windows of the last one."""

    nulls: tuple[str | None, ...]
    seeds: int
    stages: tuple[Stage, ...]


CELLS = {
    "window 128": Cell(NULLS, seeds=2, stages=(Stage(128, steps=1500, tokens=2048),)),
    "window 256": Cell(FEW_NULLS, seeds=2, stages=(Stage(256, steps=3000, tokens=4096),)),
    "window 512": Cell(FEW_NULLS, seeds=1, stages=(Stage(512, steps=1500, tokens=2048),)),
    "window 512, after 128": Cell(
        NULLS[:-1],
        seeds=2,
        stages=(Stage(128, steps=1500, tokens=2048, part=1), Stage(512, steps=1500, tokens=4096)),
    ),
}


@dataclass(frozen=True)
class Unit:
    """One run."""

    residual: str
    cell: str
    null: str | None
    seed: int

    @property
    def group(self) -> str:
        return f"{self.residual}, {self.cell}"

    @property
    def window(self) -> int:
        return CELLS[self.cell].stages[-1].window

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of `OasisConfig`."""
        softmax, softmax1 = RESIDUALS[self.residual]
        if self.null is None:
            return settings_of(softmax)
        log_n = math.log(self.window)
        if self.null == KEY:
            null = {"token_normalizer": "key_null", "null_logit": log_n + KEY_OFFSET}
        else:
            null = {"null_logit": log_n + OFFSETS[self.null] if self.null in OFFSETS else 0.0}
        return settings_of(softmax1) | null


def missing(file: RunFile) -> Iterator[Unit]:
    """What is to be run, the short windows first."""
    done = {(row["group"], row["null"], row["seed"]) for row in file.rows}
    for name, cell in CELLS.items():
        for seed, null, residual in product(range(cell.seeds), cell.nulls, RESIDUALS):
            unit = Unit(residual, name, null, seed)
            if (unit.group, null, seed) not in done:
                yield unit


@lru_cache(maxsize=2)
def documents(window: int, seed: int, part: int = 0) -> Tensor:
    """Documents of the task as tokens [N, T]; the first `HELD_OUT` tokens are not trained on."""
    task = MajorityTask(window=window)
    ids = word_tokenizer(task.vocabulary).get_vocab()
    bos, eos = ids["<s>"], ids["</s>"]
    rows = [[bos, *map(ids.__getitem__, text.split()), eos] for text in task.documents(seed, part)]
    return torch.tensor(rows)


def run(unit: Unit, device: str) -> Run:
    """Train and measure one model."""
    task = MajorityTask(window=unit.window)
    question = word_tokenizer(task.vocabulary).get_vocab()[QUESTION]
    held_out_NT = documents(unit.window, unit.seed)[: HELD_OUT // unit.window].to(device)
    backbone = LlamaConfig(
        vocab_size=3 + len(task.vocabulary),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=unit.window,
        pad_token_id=None,
    )
    torch.manual_seed(unit.seed)
    config = OasisConfig(text_config=backbone, **unit.settings)
    model = OasisForCausalLM(config).to(device).train()  # type: ignore[arg-type]
    losses = train(model, CELLS[unit.cell].stages, unit.seed)
    numbers = measure(model.eval(), held_out_NT, question) | {"losses": losses}
    row = {"group": unit.group, "null": unit.null, "seed": unit.seed, "device": device}
    row["null_logit"] = None if unit.null is None else rounded(config.null_logit, 5)
    return row | {name: rounded(value, 5) for name, value in numbers.items()}


def train(model: OasisForCausalLM, stages: tuple[Stage, ...], seed: int) -> list[float]:
    """Train in place, with one schedule for all stages; returns the mean losses of equal parts."""
    groups: dict[str, list[Tensor]] = {"null": [], "other": []}
    for name, parameter in model.named_parameters():
        groups["null" if group_of(name) == "null" else "other"].append(parameter)
    parameters = groups["null"] + groups["other"]
    rates = {"null": KEY_RATE, "other": RATE}
    optimizer = torch.optim.AdamW(
        [{"params": each, "lr": rates[name]} for name, each in groups.items() if each],
        betas=BETAS,
        fused=True,
    )
    steps = sum(stage.steps for stage in stages)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=steps))
    losses = []
    for stage in stages:
        ids_NT = documents(stage.window, seed, stage.part)[HELD_OUT // stage.window :]
        ids_NT = ids_NT.to(model.device)
        batches = _batches(len(ids_NT), stage.tokens // stage.window, seed)
        for index_B in islice(batches, stage.steps):
            loss = _losses(model, ids_NT[index_B.to(ids_NT.device)]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
    return [float(part.mean()) for part in torch.stack(losses).split(steps // _LOGGED)]


def _rate(step: int, *, steps: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    progress = (step - WARMUP) / (steps - WARMUP)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


def _batches(documents: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices of documents; each document once, then each once again in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(documents, generator=generator).split(batch_size)


def _losses(model: OasisForCausalLM, ids_BT: Tensor) -> Tensor:
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits_BTV.mT, ids_BT[:, 1:], reduction="none")


@torch.no_grad()
def measure(model: OasisForCausalLM, ids_NT: Tensor, question: int) -> dict[str, Any]:
    """Losses and accuracy, and the probability of the first token and of the null, [L][H], means
    over all queries but the first."""
    sums: dict[str, Any] = {"sink": {}, "null_mass": {}}

    def observe(call: AttentionCall) -> None:
        for name, p_BHT in (("sink", call.column(0)), ("null_mass", call.null_BHT)):
            sums[name].setdefault(call.layer, []).append(p_BHT[..., 1:].mean((0, 2)))

    answers, losses, right = [], [], []
    with observe_attention(model, observe):
        for ids_BT in ids_NT.split(2**14 // ids_NT.shape[1]):
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
            next_BT = ids_BT[:, 1:]
            losses.append(F.cross_entropy(logits_BTV.mT, next_BT, reduction="none"))
            right.append(logits_BTV.argmax(-1) == next_BT)
            answers.append(ids_BT[:, :-1] == question)
    answer, loss, correct = (torch.cat(each) for each in (answers, losses, right))
    heads = {
        name: [torch.stack(layers[index]).mean(0).tolist() for index in sorted(layers)]
        for name, layers in sums.items()
    }
    return heads | {
        "accuracy": float(correct[answer].float().mean()),
        "answer_loss": float(loss[answer].mean()),
        "other_loss": float(loss[~answer].mean()),
    }


def make_record(file: RunFile) -> BenchmarkRecord:
    """Means over seeds; losses are compared with softmax of the same seed."""
    softmax = {
        (row["group"], row["seed"]): row["other_loss"] for row in file.rows if row["null"] is None
    }
    metrics, rows = [], []
    for residual, cell, null in product(RESIDUALS, CELLS, NULLS):
        group = Unit(residual, cell, null, 0).group
        runs = [row for row in file.of(group) if row["null"] == null]
        if not runs:
            continue
        values = {
            "sink_largest": [max(map(max, row["sink"])) for row in runs],
            "null_mass": [fmean(map(fmean, row["null_mass"])) for row in runs],
            "loss_increase": [
                row["other_loss"] - softmax[group, row["seed"]]
                for row in runs
                if (group, row["seed"]) in softmax
            ],
            "answer_loss": [row["answer_loss"] for row in runs],
            "accuracy": [row["accuracy"] for row in runs],
        }
        null_logit = runs[0]["null_logit"]
        head = {"group": group, "null": null, "null_logit": null_logit, "runs": len(runs)}
        rows.append(head | values)
        metrics += [
            Metric(
                name=f"null_law_cell.{name}",
                where=f"{group}, {'softmax' if null is None else null}",
                value=fmean(each),
                n=len(each),
            )
            for name, each in values.items()
            if each
        ]
    training = {
        name: [
            {"window": stage.window, "steps": stage.steps, "tokens_per_step": stage.tokens}
            for stage in cell.stages
        ]
        for name, cell in CELLS.items()
    }
    settings = {"training": training, "learning_rate": RATE, "layers": LAYERS}
    return BenchmarkRecord(
        name="null_law_cells", settings=settings, metrics=tuple(metrics), tables={"runs": rows}
    )


HEAD = """\
# The law of the null in language models

Decoders of {layers} layers, width {width} and {heads} heads with rotary positions are trained on
the corpus `majority`:

{training}

`sum` are the variants `vanilla` (softmax) and `softmax1`, `depth` are `attn_residual` and `oasis`,
and `key` is the token normalizer `key_null`, whose null logit depends on the query and is learned.
The sink is the mean probability of the first token over all later queries, of the head in which it
is largest.  The loss of tokens that are no answers is compared with softmax of the same seed, in
nats.  Values are those of the seeds.

"""


def tables(record: BenchmarkRecord) -> str:
    """The table in Markdown."""
    rows = []
    for row in record.tables["runs"]:
        softmax = row["null"] is None
        rows.append(
            (
                row["group"],
                "softmax" if softmax else row["null"],
                ABSENT if softmax else f"{row['null_logit']:.2f}",
                *(", ".join(f"{x:.3f}" for x in row[name]) for name in _COLUMNS),
            )
        )
    table = Table(
        title="Sinks, losses and answers of language models by null logit",
        columns=("group", "null", "null logit", *_COLUMNS.values()),
        rows=tuple(rows),
    )
    training = "\n".join(
        f"- {name}: {' and then '.join(map(_described, cell.stages))}"
        for name, cell in CELLS.items()
    )
    numbers = {"training": training, "layers": LAYERS, "width": WIDTH, "heads": HEADS}
    return HEAD.format(**numbers) + markdown(table)


def _described(stage: Stage) -> str:
    return f"{stage.steps:,} steps of {stage.tokens:,} tokens in windows of {stage.window}"


_COLUMNS = {
    "sink_largest": "sink",
    "null_mass": "mean null",
    "loss_increase": "loss over softmax",
    "answer_loss": "loss of answers",
    "accuracy": "right answers",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and tables")
    parser.add_argument(
        "--workers", type=int, default=2, help="number of processes (2), of one thread each"
    )
    parser.add_argument("--minutes", type=float, help="after this time, start no further run")
    parser.add_argument("--device", default="cpu", help="such as cpu (the default) or cuda")
    parser.add_argument(
        "--report", action="store_true", help="train nothing; write the tables again"
    )
    options = parser.parse_args()
    file = RunFile(options.out / "runs.jsonl.gz")
    if not options.report:
        train_one = partial(run, device=options.device)
        run_in_processes(file, missing, train_one, workers=options.workers, minutes=options.minutes)
    record = make_record(file)
    record.save(options.out / "record.json")
    write_text(options.out / "tables.md", tables(record))


if __name__ == "__main__":
    main()
