"""`oasis prefix`: a few tokens in front, so that a model can be quantised as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from oasis_attn.cli.terminal import AsJson, print_table, working


def prefix(
    model: Annotated[
        str, Argument(help="Hub id, local folder, GGUF file, or [bold]smollm2[/bold].")
    ],
    out: Annotated[Path, Argument(help="A new folder for the model with its prefix.")],
    method: Annotated[str, Option(help="greedy (CushionCache) or frequency (PrefixQuant).")] = (
        "greedy"
    ),
    length: Annotated[int, Option(help="Tokens in the prefix, at most.")] = 4,
    tune_steps: Annotated[int, Option(help="Steps to train its keys and values for.")] = 0,
    corpus: Annotated[
        str, Option(help="A corpus by name, or a local .txt, .jsonl or .jsonl.gz file.")
    ] = "stdlib",
    split: Annotated[str, Option(help="Which split of the corpus to read.")] = "validation",
    window: Annotated[int, Option(help="Tokens per window.")] = 512,
    windows: Annotated[int, Option(help="Windows to calibrate on, and to measure on.")] = 8,
    scheme: Annotated[
        str, Option(help="A static scheme; the record has its perplexity before and after.")
    ] = "w8a8-static-linear",
    as_json: AsJson = False,
) -> None:
    """Find a prefix that takes the sinks out of a model's static ranges, and store it with it.

    Example: [bold]oasis prefix smollm2 rescued --corpus wikitext-2[/bold]
    """
    from oasis_attn.quantization.rescue import rescue
    from oasis_attn.report import Table

    with working(f"looking for a prefix of {model}"):
        record = rescue(
            model,
            out,
            method=method,
            length=length,
            tune_steps=tune_steps,
            corpus=corpus,
            split=split,
            window=window,
            windows=windows,
            scheme=scheme,
        )
    if as_json:
        print(record.to_json())
        return
    names = dict.fromkeys(metric.name for metric in record.metrics)
    rows = tuple(
        (name, *(f"{record.metric(name, where).value:.4g}" for where in ("before", "after")))
        for name in names
    )
    title = f"Prefix {record.subject['prefix_text']!r}, tokens {record.subject['prefix']}"
    print_table(Table(title=title, columns=("", "before", "after"), rows=rows))
