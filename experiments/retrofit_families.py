"""Move the sinks of small models of three families into nulls.

python experiments/retrofit_families.py

Trains a tiny model of each family from random weights on sequences of `majority` (without BOS, so
that any word can be the first token) until it has a sink, moves the sink into a null without
training, and measures both models on other sequences.  Writes the record and the table to
docs/results/retrofit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from oasis_attn.data import as_windows
from oasis_attn.data.majority import MajorityTask
from oasis_attn.files import write_text
from oasis_attn.hub.null_from_sink import null_from_sink
from oasis_attn.measure.sink_conversion import measure_sink
from oasis_attn.records import BenchmarkRecord, Metric
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import Table, number

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "retrofit"
FAMILIES = ("llama", "qwen3", "gemma")
TASK = MajorityTask(window=34, classes=2, class_words=16, rate=0.2)  # 32 words
SIZE = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
STEPS, BATCH, RATE, HELD_OUT = 800, 32, 3e-3, 64
METRICS = ("loss.windowed", "sink.mass", "sink.max_mass", "outlier.max_activation")


def sequences() -> Iterator[Tensor]:
    """The documents of the task as ids [T]."""
    ids = {word: place for place, word in enumerate(TASK.vocabulary)}
    for text in TASK.documents():
        yield torch.tensor([ids[word] for word in text.split()])


def trained(family: str, batches: Iterator[Tensor]) -> PreTrainedModel:
    """A model of `family` after `STEPS` steps (AdamW, one-cycle learning rate)."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](vocab_size=len(TASK.vocabulary), **SIZE)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    for ids_BT in islice(batches, STEPS):
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def batches_of(documents: Iterator[Tensor]) -> Iterator[Tensor]:
    while True:
        yield torch.stack(list(islice(documents, BATCH)))


def main() -> None:
    metrics: list[Metric] = []
    for family in FAMILIES:
        documents = sequences()
        held_out = torch.stack(list(islice(documents, HELD_OUT)))
        calibration = torch.stack(list(islice(documents, HELD_OUT)))
        windows = as_windows(
            held_out, tokenizer=None, window=None, windows=HELD_OUT,
            vocab_size=len(TASK.vocabulary),
        )  # fmt: skip
        before = trained(family, batches_of(documents))
        after = null_from_sink(before, calibration).model
        for where, model in (("before", before), ("after", after)):
            found, _ = measure_sink(model, windows)
            metrics += [
                replace(metric, where=f"{family} / {where}")
                for metric in found
                if metric.name in METRICS
            ]
    record = BenchmarkRecord(
        name="retrofit families",
        settings={"size": SIZE, "steps": STEPS, "batch": BATCH, "learning_rate": RATE},
        data={"task": "majority", "windows": HELD_OUT, "tokens": TASK.window - 2},
        seed=0,
        metrics=tuple(metrics),
    )
    record.save(RESULTS / "families.json")
    write_text(RESULTS / "families.md", markdown(table(record)))


def table(record: BenchmarkRecord) -> Table:
    """One row per family; each number before and after."""

    def cell(family: str, name: str) -> str:
        before, after = (record.metric(name, f"{family} / {x}").value for x in ("before", "after"))
        return f"{number(before)} -> {number(after)}"

    return Table(
        columns=("family", *(f"`{name}`" for name in METRICS)),
        rows=tuple((family, *(cell(family, name) for name in METRICS)) for family in FAMILIES),
    )


if __name__ == "__main__":
    main()
