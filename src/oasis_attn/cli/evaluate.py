"""`oasis evaluate`: perplexity on text, Pass@k on word problems."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from oasis_attn.cli.terminal import AsJson, TrustRemoteCode, print_table, working
from oasis_attn.errors import UserError, shown

if TYPE_CHECKING:
    from oasis_attn.records import EvaluationRecord
    from oasis_attn.report import Table


def evaluate(
    model: Annotated[
        str, Argument(help="Hub id, local folder, GGUF file, or [bold]smollm2[/bold].")
    ],
    tasks: Annotated[
        str, Option(help="Of perplexity, gsm8k, gsm8k-loglik, arith; commas between.")
    ] = "perplexity",
    corpus: Annotated[
        str, Option(help="For perplexity: a corpus by name, or a local text file.")
    ] = "wikitext-2",
    split: Annotated[str, Option(help="Which split of the corpus to read.")] = "test",
    window: Annotated[int, Option(help="Tokens per window.")] = 512,
    stride: Annotated[
        int | None,
        Option(help="Tokens from window to window; default, no overlap.", show_default=False),
    ] = None,
    shots: Annotated[int, Option(help="Worked examples before each problem of gsm8k.")] = 5,
    k: Annotated[str, Option(help="The ks of Pass@k; commas between.")] = "1",
    repeats: Annotated[int, Option(help="Samples per problem, at least the largest k.")] = 1,
    temperature: Annotated[float, Option(help="Of the samples; 0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, Option(help="An answer is cut off after so many.")] = 256,
    seed: Annotated[int, Option(help="Of the samples.")] = 0,
    limit: Annotated[
        int | None,
        Option(help="Problems or windows per task, from the first.", show_default=False),
    ] = None,
    batch_size: Annotated[int, Option(help="Windows or samples per forward pass.")] = 8,
    kv_bits: Annotated[
        int | None,
        Option(
            help="Quantise the key-value cache, but for the first 32 tokens and the last 96: 2, 4"
            " or 8 bits.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        Option(help="Log every sample to this folder, a file per task.", show_default=False),
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the logs in --samples.")] = False,
    out: Annotated[
        Path | None, Option(help="Write the record to this JSON file.", show_default=False)
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure how well a model predicts text and solves problems.

    Example: [bold]oasis evaluate smollm2 --tasks perplexity,arith --limit 50[/bold]
    """
    given = {name: value for name, value in locals().items() if name not in _NOT_FIELDS}

    from oasis_attn.evaluation import evaluate as run
    from oasis_attn.files import check_writable
    from oasis_attn.quantization.kv_cache import (
        FIRST,
        RECENT,
        QuantizedCache,
        check_bits,
        check_window,
    )

    if out is not None:
        check_writable(out)
    given["tasks"] = tuple(tasks.split(","))
    given["k"] = _whole_numbers("--k", k)
    if kv_bits is not None:
        check_bits(kv_bits)
        if "perplexity" in given["tasks"]:
            check_window(window)
        given["cache"] = partial(QuantizedCache, bits=kv_bits)
        given["model_notes"] = {"kv_cache": {"bits": kv_bits, "first": FIRST, "recent": RECENT}}
    with working(f"evaluating {model}"):
        record = run(model, **given)
    if out is not None:
        record.save(out)
    if as_json:
        print(record.to_json())
    else:
        print_table(_table(record))


_NOT_FIELDS = ("model", "kv_bits", "out", "as_json")


def _whole_numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(
            f"{option}: {shown(text)} is not whole numbers with commas between"
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
    return Table(title=label(record), columns=("measure", "value", "95 % interval", "n"), rows=rows)
