"""`oasis train`: one variant, from scratch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from oasis_attn.cli.terminal import AsJson, print_table
from oasis_attn.errors import UserError


def train(
    out: Annotated[Path, Option(help="A new folder for the model and its record.")],
    variant: Annotated[str, Option(help="A name that `oasis variants` lists.")] = "oasis",
    size: Annotated[
        str, Option(help="nano, micro, mini, small, medium, or a Hugging Face config file.")
    ] = "nano",
    corpus: Annotated[
        str, Option(help="A corpus by name, or a local text file or folder.")
    ] = "stdlib",
    settings: Annotated[
        list[str] | None,
        Option(
            "--set", metavar="NAME=VALUE", help="Override a setting of the variant; repeatable."
        ),
    ] = None,
    steps: Annotated[int, Option(help="Optimiser steps.")] = 1000,
    seed: Annotated[int, Option(help="Of initial weights and data order.")] = 0,
    block_length: Annotated[int, Option(help="Tokens per sequence.")] = 256,
    batch_size: Annotated[int, Option(help="Sequences per forward pass.")] = 16,
    gradient_accumulation: Annotated[int, Option(help="Forward passes per step.")] = 1,
    learning_rate: Annotated[float, Option(help="At its peak; then cosine to 0.")] = 2e-3,
    warmup: Annotated[float, Option(help="Share of the steps.")] = 0.05,
    weight_decay: Annotated[float, Option(help="AdamW's, on matrices only.")] = 0.1,
    clip: Annotated[float, Option(help="Largest norm of the gradient.")] = 1.0,
    bf16: Annotated[bool, Option("--bf16", help="bfloat16 autocast.")] = False,
    vocab_size: Annotated[
        int | None, Option(help="Of the tokenizer; default, the size's.", show_default=False)
    ] = None,
    save_every: Annotated[int, Option(help="Steps between checkpoints.")] = 500,
    log_every: Annotated[int, Option(help="Steps per row of the loss table.")] = 10,
    eval_split: Annotated[str, Option(help="Split the final loss is measured on.")] = "validation",
    eval_windows: Annotated[int, Option(help="Blocks of it, at most.")] = 64,
    resume: Annotated[
        bool, Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model from scratch; --out then holds it in Hugging Face form.

    Example: [bold]oasis train --variant oasis --steps 1000 --out runs/oasis[/bold]
    """
    given = {name: value for name, value in locals().items() if name not in ("settings", "as_json")}

    from oasis_attn.report import summary_table
    from oasis_attn.training import TrainingConfig
    from oasis_attn.training import train as run

    record = run(TrainingConfig(**given, settings=dict(map(_setting, settings or ()))))
    if as_json:
        print(record.to_json())
    else:
        print_table(summary_table(record))


def _setting(text: str) -> tuple[str, Any]:
    """`name=value`, the value read as JSON where it is JSON: numbers, true, null."""
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise UserError(f"--set: {text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
