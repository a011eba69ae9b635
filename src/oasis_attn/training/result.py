"""The results of a training run: its model folder and its record."""

from __future__ import annotations

import math
import os
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.data import Windows
from oasis_attn.files import make_readable
from oasis_attn.hub.model_info import describe_model
from oasis_attn.ops.token_losses import token_losses
from oasis_attn.records import BlocksInfo, Metric, TrainingData, TrainingRecord, current_environment
from oasis_attn.training.checkpoints import STAGING
from oasis_attn.training.config import TrainingConfig
from oasis_attn.training.prepare import Prepared

_COLUMNS = {  # key in the Trainer's log -> column in the record
    "step": "step",
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
    "outlier_penalty": "outlier_penalty",
    "null_logit": "null_logit",
    "null_factor": "null_factor",
}


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Save the model and its tokenizer in `out`.

    The files are written to a staging folder and then moved one by one.  config.json is last:
    without it the folder does not count as a model.
    """
    model.config.use_cache = True  # the Trainer had switched it off
    staged = out / STAGING
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    make_readable(staged)
    for path in sorted(staged.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, out / path.name)
    staged.rmdir()


def training_record(
    config: TrainingConfig,
    prepared: Prepared,
    model: PreTrainedModel,
    history: list[dict[str, Any]],
    tokens_per_second: float,
    device: torch.device,
) -> TrainingRecord:
    """The record of a finished run; `history` and `device` are those of the Trainer."""
    table = [
        {name: row[key] for key, name in _COLUMNS.items() if key in row}
        for row in history
        if "loss" in row
    ]
    blocks, windows = prepared.blocks, prepared.windows
    losses = _window_losses(model, windows)
    count, loss = len(losses), statistics.fmean(losses)
    error = statistics.stdev(losses) / math.sqrt(count) if count > 1 else None
    perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()
    identity = prepared.identity
    return TrainingRecord(
        environment=current_environment(device),
        model=replace(
            describe_model(model),
            name=str(config.out),
            variant=config.to_dict()["variant"],
        ),
        trained_parameters=prepared.trained_parameters,
        weights_sha256=identity["weights_sha256"],
        training=config.to_dict(),
        processes=identity["processes"],
        data=TrainingData(
            corpus=prepared.corpus.name,
            corpus_sha256=identity["corpus_sha256"],
            tokenizer_sha256=identity["tokenizer_sha256"],
            block_length=config.block_length,
            train=BlocksInfo(split="train", blocks=len(blocks), sha256=blocks.sha256),
            eval=windows.info,
        ),
        seed=config.seed,
        metrics=(
            Metric(name="loss.windowed", value=loss, n=count, standard_error=error),
            Metric(name="perplexity.windowed", value=perplexity, n=count),
            Metric(name="training.loss", value=table[-1]["loss"]),
            Metric(name="training.tokens_per_second", value=tokens_per_second),
        ),
        tables={"loss": table},
    )


def _window_losses(model: PreTrainedModel, windows: Windows) -> list[float]:
    """Mean next-token loss of each window, in nats, one window at a time.

    Not the loss that the model returns, to which families with experts can add one of their own.
    """
    model.eval()
    losses = []
    with torch.inference_mode():
        for ids_T in windows.ids_NT.to(model.device):
            logits_1TV = model(input_ids=ids_T[None], use_cache=False).logits
            losses.append(token_losses(logits_1TV, ids_T[None]).mean().item())
    return losses
