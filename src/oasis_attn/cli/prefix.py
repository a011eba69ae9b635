"""`oasis prefix`: a few tokens in front, so that a model can be quantised as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.markup import escape
from typer import Argument, Option

from oasis_attn.cli.terminal import AsJson, TrustRemoteCode, pair, print_table, working


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
    scheme: Annotated[
        str, Option(help="It is judged by: w8a8-static-linear or w8a8-static.")
    ] = "w8a8-static-linear",
    settings: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change the scheme, as weight.granularity=channel; repeatable.",
        ),
    ] = None,
    calibration: Annotated[
        str,
        Option(help="A corpus by name, or a local text file, to search, tune and calibrate on."),
    ] = "stdlib",
    calibration_split: Annotated[str, Option(help="Which split of it to read.")] = "train",
    evaluation: Annotated[
        str | None,
        Option(help="The same to measure on; default, that corpus.", show_default=False),
    ] = None,
    evaluation_split: Annotated[str, Option(help="Which split of it to read.")] = "test",
    window: Annotated[int, Option(help="Tokens per window.")] = 512,
    windows: Annotated[
        int,
        Option(help="Windows to calibrate on, and to measure on, spread over each split."),
    ] = 16,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Find a prefix that takes the sinks out of a model's static ranges, and store it with it.

    Example: [bold]oasis prefix smollm2 rescued --tune-steps 32[/bold]
    """
    from oasis_attn.errors import check_choice
    from oasis_attn.quantization import schemes
    from oasis_attn.quantization.rescue import rescue
    from oasis_attn.report import Table

    check_choice("scheme", scheme, schemes())
    changes = dict(pair("--set", text) for text in settings or ())
    with working(f"looking for a prefix of {model}") as status:
        record = rescue(
            model,
            out,
            method=method,
            length=length,
            tune_steps=tune_steps,
            scheme=schemes()[scheme].vary(changes),
            calibration=calibration,
            calibration_split=calibration_split,
            evaluation=evaluation,
            evaluation_split=evaluation_split,
            window=window,
            windows=windows,
            trust_remote_code=trust_remote_code,
            tell=lambda what: status.update(escape(f"{model}: {what}")),
        )
    if as_json:
        print(record.to_json())
        return
    names = dict.fromkeys(metric.name for metric in record.metrics)
    rows = tuple((name, *(f"{value:.4g}" for value in record.before_after(name))) for name in names)
    title = f"Prefix {record.text!r}, tokens {list(record.tokens)}"
    print_table(Table(title=title, columns=("", "before", "after"), rows=rows))
