"""`oasis train`: one variant from scratch, or a model that exists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from oasis_attn.cli.terminal import AsJson, TrustRemoteCode, pair, print_table


def train(
    out: Annotated[Path, Option(help="A new folder for the model and its record.")],
    from_model: Annotated[
        str | None,
        Option(
            "--from",
            metavar="MODEL",
            help="Train this one on: a folder, hub id, .gguf file or smollm2.",
            show_default=False,
        ),
    ] = None,
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
    learning_rate: Annotated[
        float | None,
        Option(
            help="At its peak; then cosine to 0. Default 2e-3, with --from 1e-4.",
            show_default=False,
        ),
    ] = None,
    learning_rates: Annotated[
        list[str] | None,
        Option(
            "--rate",
            metavar="GROUP=RATE",
            help="Peak of one group: backbone, router, beta, null or lora; repeatable.",
        ),
    ] = None,
    trainable: Annotated[
        list[str] | None,
        Option(
            metavar="PATTERN",
            help="Train only parameters named so, such as 'model.layers.2?.*', or a group of them;"
            " repeatable.",
        ),
    ] = None,
    lora_rank: Annotated[int, Option(help="Above 0: backbone through LoRA of this rank.")] = 0,
    anneal_null: Annotated[
        int, Option(metavar="N", help="Raise the null logit to 0 over the first N steps.")
    ] = 0,
    outlier_penalty: Annotated[
        float, Option(help="Weight of the activations' mean log-peak over tokens, beside the loss.")
    ] = 0.0,
    activation_checkpointing: Annotated[
        bool, Option("--activation-checkpointing", help="Recompute layers in backward.")
    ] = False,
    warmup: Annotated[float, Option(help="Share of the steps.")] = 0.05,
    weight_decay: Annotated[float, Option(help="AdamW's, on matrices only.")] = 0.1,
    clip: Annotated[float, Option(help="Largest norm of the gradient.")] = 1.0,
    bf16: Annotated[bool, Option("--bf16", help="bfloat16 autocast.")] = False,
    vocab_size: Annotated[
        int | None, Option(help="Of the tokenizer; default, the size's.", show_default=False)
    ] = None,
    save_every: Annotated[
        int, Option(help="Steps between checkpoints, a multiple of --log-every.")
    ] = 500,
    log_every: Annotated[int, Option(help="Steps per row of the loss table.")] = 10,
    eval_split: Annotated[str, Option(help="Split the final loss is measured on.")] = "validation",
    eval_windows: Annotated[int, Option(help="Blocks of it, at most.")] = 64,
    resume: Annotated[
        bool, Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Train a model, from scratch or on; --out then holds it in Hugging Face form.

    Example: [bold]oasis train --variant oasis --steps 1000 --out runs/oasis[/bold]

    On: [bold]oasis train --from runs/converted --anneal-null 200 --out runs/healed[/bold]

    On several processes: [bold]accelerate launch -m oasis_attn train ...[/bold]
    """
    given = {name: value for name, value in locals().items() if name != "as_json"}

    from oasis_attn.report import summary_table
    from oasis_attn.training import TrainingConfig
    from oasis_attn.training import train as run

    given["settings"] = dict(pair("--set", text) for text in settings or ())
    given["learning_rates"] = dict(pair("--rate", text) for text in learning_rates or ())
    record = run(TrainingConfig(**given))
    if as_json:
        print(record.to_json())
    else:
        print_table(summary_table(record))
