"""`oasis evaluate`: perplexity on text, and the answers to word problems and other tasks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from oasis_attn.cli.terminal import (
    AsJson,
    Device,
    Model,
    TrustRemoteCode,
    print_saved,
    print_table,
    working,
)
from oasis_attn.errors import UserError, shown

if TYPE_CHECKING:
    from oasis_attn.records import EvaluationRecord
    from oasis_attn.report import Table


def evaluate(
    model: Model,
    tasks: Annotated[
        str,
        Option(help="Comma-separated list of perplexity, gsm8k, gsm8k-loglik, arith and majority."),
    ] = "perplexity",
    corpus: Annotated[
        str,
        Option(
            help="Corpus for perplexity: a name, or a local text file. For majority: the corpus"
            " with the task, such as majority-64."
        ),
    ] = "wikitext-2",
    split: Annotated[str, Option(help="Split of the corpus for perplexity.")] = "test",
    window: Annotated[int, Option(help="Tokens per window for perplexity.")] = 512,
    stride: Annotated[
        int | None,
        Option(
            help="Tokens between the starts of two windows. Default: the window, so that windows"
            " do not overlap.",
            show_default=False,
        ),
    ] = None,
    shots: Annotated[int, Option(help="Number of solved examples before each gsm8k problem.")] = 5,
    k: Annotated[str, Option(help="Comma-separated values of k for Pass@k.")] = "1",
    repeats: Annotated[int, Option(help="Samples per problem; at least the largest k.")] = 1,
    temperature: Annotated[float, Option(help="Sampling temperature; 0 is greedy decoding.")] = 0.0,
    max_new_tokens: Annotated[int, Option(help="Maximum number of tokens of an answer.")] = 256,
    seed: Annotated[int, Option(help="Random seed of the samples.")] = 0,
    limit: Annotated[
        int | None,
        Option(
            help="Maximum number of problems per task (the first ones), and of windows for"
            " perplexity and majority (spread over the text).",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, Option(help="Windows or samples per forward pass.")] = 8,
    kv_bits: Annotated[
        int | None,
        Option(
            help="Quantize the key-value cache to 2, 4 or 8 bits, except for the first 32 and the"
            " last 96 tokens.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        Option(help="Write all samples to this folder, one file per task.", show_default=False),
    ] = None,
    resume: Annotated[
        bool, Option("--resume", help="Resume from the sample files in --samples.")
    ] = False,
    out: Annotated[
        Path | None, Option(help="Write the record to this JSON file.", show_default=False)
    ] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on text, and the accuracy of answers to problems.

    Example: [bold]oasis evaluate smollm2 --tasks perplexity,arith --limit 50[/bold]
    """
    given = {name: value for name, value in locals().items() if name not in _NOT_FIELDS}

    from oasis_attn.data import load_corpus
    from oasis_attn.devices import check_device
    from oasis_attn.evaluation import EvaluationConfig
    from oasis_attn.files import check_writable
    from oasis_attn.hub.locate import find_model
    from oasis_attn.quantization.options import (
        KV_FIRST,
        KV_RECENT,
        check_kv_bits,
        check_kv_window,
    )

    if out is not None:
        check_writable(out)
    given["tasks"] = tuple(tasks.split(","))
    given["k"] = _whole_numbers("--k", k)
    if kv_bits is not None:
        check_kv_bits(kv_bits)
        if "perplexity" in given["tasks"]:
            check_kv_window(window)
        given["model_notes"] = {
            "kv_cache": {"bits": kv_bits, "first": KV_FIRST, "recent": KV_RECENT}
        }
    EvaluationConfig(**given).check_logs()
    check_device(device)
    find_model(model)
    if "perplexity" in given["tasks"]:
        load_corpus(corpus, split).check()

    from oasis_attn.evaluation import evaluate as run
    from oasis_attn.quantization import QuantizedCache

    if kv_bits is not None:
        given["cache"] = partial(QuantizedCache, bits=kv_bits)
    with working(f"evaluating {model}", as_json=as_json):
        record = run(model, device=device, trust_remote_code=trust_remote_code, **given)
    if out is not None:
        record.save(out)
    if as_json:
        print(record.to_json())
    else:
        print_table(_table(record))
        command = ("oasis", "report", out) if out is not None else ()
        print_saved(out, samples, purpose="make a page of it", command=command)


_NOT_FIELDS = ("model", "kv_bits", "out", "device", "trust_remote_code", "as_json")


def _whole_numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(
            f"{option}: {shown(text)} is not a comma-separated list of whole numbers"
        ) from error


def _table(record: EvaluationRecord) -> Table:
    from oasis_attn.report import Table, label, number

    intervals = record.intervals
    rows = tuple(
        (
            metric.name,
            number(metric.value),
            " to ".join(map(number, intervals.get(metric.name, ()))) or "-",
            str(metric.n),
        )
        for metric in record.metrics
    )
    return Table(title=label(record), columns=("metric", "value", "95 % interval", "n"), rows=rows)
