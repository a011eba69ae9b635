"""`oasis train`: train a variant from scratch, or an existing model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Option

from oasis_attn.cli.terminal import AsJson, TrustRemoteCode, pairs, print_saved, print_table
from oasis_attn.errors import UserError

_OPTIMIZATION = "Optimization"
_NULL = "Null, distillation and outliers"
_LOG = "Checkpoints, measurements and logs"


def train(
    out: Annotated[Path, Option(help="A new folder for the model and its record.")],
    from_model: Annotated[
        str | None,
        Option(
            "--from",
            metavar="MODEL",
            help="Train an existing model: a folder, Hub id, GGUF file or smollm2.",
            show_default=False,
        ),
    ] = None,
    variant: Annotated[
        str | None,
        Option(
            help="A variant of `oasis variants`, not with --from. Default: oasis.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str | None,
        Option(
            help="pico, nano, micro, mini, small, medium, or a Hugging Face config file; not with"
            " --from. Default: nano.",
            show_default=False,
        ),
    ] = None,
    corpus: Annotated[
        str, Option(help="Name of a corpus, or a local text file or folder.")
    ] = "stdlib",
    settings: Annotated[
        list[str] | None,
        Option(
            "--config",
            metavar="NAME=VALUE",
            help="Override a setting of the variant's configuration; repeatable. With --from, only"
            " null_logit, the final value for --anneal-null.",
        ),
    ] = None,
    steps: Annotated[int, Option(help="Number of optimizer steps.")] = 1000,
    seed: Annotated[int, Option(help="Random seed of initial weights and data order.")] = 0,
    block_length: Annotated[
        int, Option(help="Tokens per sequence.", rich_help_panel=_OPTIMIZATION)
    ] = 256,
    batch_size: Annotated[
        int, Option(help="Sequences per forward pass.", rich_help_panel=_OPTIMIZATION)
    ] = 16,
    gradient_accumulation: Annotated[
        int, Option(help="Forward passes per step.", rich_help_panel=_OPTIMIZATION)
    ] = 1,
    learning_rate: Annotated[
        float | None,
        Option(
            help="Peak learning rate (cosine decay to 0). Default: 2e-3, or 1e-4 with --from.",
            show_default=False,
            rich_help_panel=_OPTIMIZATION,
        ),
    ] = None,
    learning_rates: Annotated[
        list[str] | None,
        Option(
            "--rate",
            metavar="GROUP=RATE",
            help="Peak learning rate of one parameter group: backbone, router, beta, null or lora;"
            " repeatable.",
            rich_help_panel=_OPTIMIZATION,
        ),
    ] = None,
    trainable: Annotated[
        list[str] | None,
        Option(
            metavar="PATTERN",
            help="Train only parameters that match PATTERN, such as 'model.layers.2?.*', or only"
            " one group; repeatable.",
            rich_help_panel=_OPTIMIZATION,
        ),
    ] = None,
    lora_rank: Annotated[
        int,
        Option(
            help="With --from: if above 0, train the backbone with LoRA of this rank.",
            rich_help_panel=_OPTIMIZATION,
        ),
    ] = 0,
    anneal_null: Annotated[
        int,
        Option(
            metavar="N",
            help="Raise the null logit during the first N steps to its setting (--config"
            " null_logit=NUMBER or log_context; with --from, the default is 0).",
            rich_help_panel=_NULL,
        ),
    ] = 0,
    null_to_logit: Annotated[
        int,
        Option(
            metavar="N",
            help="Turn the nulls of a model from `convert --null-from-sink`, which have keys and"
            " values, into a logit per head during the first N steps.",
            rich_help_panel=_NULL,
        ),
    ] = 0,
    distill_from: Annotated[
        str | None,
        Option(
            metavar="MODEL",
            help="Train on the divergence from the next-token distributions of this model.",
            show_default=False,
            rich_help_panel=_NULL,
        ),
    ] = None,
    distill_weight: Annotated[
        float,
        Option(
            help="With --distill-from: weight W of the divergence, and 1 - W of the loss.",
            rich_help_panel=_NULL,
        ),
    ] = 1.0,
    outlier_penalty: Annotated[
        float,
        Option(
            help="Weight of a penalty on tokens with large activations: the log of the largest mean"
            " square of a token, relative to the mean of all tokens.",
            rich_help_panel=_NULL,
        ),
    ] = 0.0,
    outlier_tensors: Annotated[
        str,
        Option(
            help="What the penalty reads: linear_inputs, or layer_outputs (residual stream).",
            rich_help_panel=_NULL,
        ),
    ] = "linear_inputs",
    activation_checkpointing: Annotated[
        bool,
        Option(
            "--activation-checkpointing",
            help="Recompute layers in the backward pass.",
            rich_help_panel=_OPTIMIZATION,
        ),
    ] = False,
    warmup: Annotated[
        float,
        Option(help="Fraction of the steps with a linear warm-up.", rich_help_panel=_OPTIMIZATION),
    ] = 0.05,
    weight_decay: Annotated[
        float,
        Option(
            help="Weight decay of AdamW, on weight matrices only.", rich_help_panel=_OPTIMIZATION
        ),
    ] = 0.1,
    clip: Annotated[
        float, Option(help="Maximum gradient norm.", rich_help_panel=_OPTIMIZATION)
    ] = 1.0,
    bf16: Annotated[
        bool, Option("--bf16", help="Use bfloat16 autocast.", rich_help_panel=_OPTIMIZATION)
    ] = False,
    vocab_size: Annotated[
        int | None,
        Option(
            help="Vocabulary size of the tokenizer. Default: that of --size.", show_default=False
        ),
    ] = None,
    save_every: Annotated[
        int,
        Option(
            help="Steps between two checkpoints; a multiple of --log-every.", rich_help_panel=_LOG
        ),
    ] = 500,
    log_every: Annotated[
        int, Option(help="Steps per row of the loss table.", rich_help_panel=_LOG)
    ] = 10,
    eval_split: Annotated[
        str, Option(help="Split of the corpus for the final loss.", rich_help_panel=_LOG)
    ] = "validation",
    eval_windows: Annotated[
        int,
        Option(
            help="Maximum number of windows for the final loss, spread over the split.",
            rich_help_panel=_LOG,
        ),
    ] = 64,
    report_to: Annotated[
        str | None,
        Option(
            help="Also log to wandb, trackio or tensorboard (files in the folder of --out), with"
            " attention sinks and outliers.",
            show_default=False,
            rich_help_panel=_LOG,
        ),
    ] = None,
    log_sinks_every: Annotated[
        int | None,
        Option(
            metavar="N",
            help="With --report-to: steps between measurements of sinks and outliers. Default: 100,"
            " which costs less than 5 % of the time.",
            show_default=False,
            rich_help_panel=_LOG,
        ),
    ] = None,
    resume: Annotated[
        bool, Option("--resume", help="Resume from the last checkpoint in --out.")
    ] = False,
    device: Annotated[
        str,
        Option(
            metavar="DEVICE",
            help="Where to train: auto (all visible GPUs, or the CPU if there is none), cpu or"
            " cuda.",
        ),
    ] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Train a model, from scratch or from an existing one, and save it as a Hugging Face model.

    Example: [bold]oasis train --variant oasis --steps 1000 --out runs/oasis[/bold]

    Existing model: [bold]oasis train --from converted --anneal-null 200 --out runs/healed[/bold]

    Several processes: [bold]accelerate launch -m oasis_attn train ...[/bold]
    """
    given = dict(locals())
    del given["as_json"], given["log_sinks_every"]
    given["settings"] = pairs("--config", settings)
    given["learning_rates"] = pairs("--rate", learning_rates)

    from oasis_attn.data import load_corpus
    from oasis_attn.errors import check_whole
    from oasis_attn.files import check_free
    from oasis_attn.hub.locate import find_model
    from oasis_attn.modeling.settings import check_names
    from oasis_attn.training import TrainingConfig

    if log_sinks_every is not None:
        check_whole("log_sinks_every", log_sinks_every, 1)
        if report_to is None:
            raise UserError(f"log_sinks_every: {log_sinks_every} has no effect without report_to")
    if not resume:
        check_free(out, hint=", or continue its run with --resume")
    check_names(given["settings"])
    load_corpus(corpus).check()
    load_corpus(corpus, eval_split, arguments=("corpus", "eval_split")).check()
    for name in (from_model, distill_from):
        if name is not None:
            find_model(name)
    config = TrainingConfig(**given)

    from oasis_attn.measure.sink_callback import EVERY, SinkCallback
    from oasis_attn.report import summary_table
    from oasis_attn.training import train as run

    watch = [partial(SinkCallback, every=log_sinks_every or EVERY)] if report_to else []
    record = run(config, callbacks=watch)
    if as_json:
        print(record.to_json())
    else:
        print_table(summary_table(record))
        print_saved(out, purpose="measure it", command=("oasis", "diagnose", out))
