"""Calibration data: batches of token ids, or of embeddings for models that are fed without tokens.

Axes: B sequences, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.errors import UserError, check_iterable


def check_batches(model: PreTrainedModel, calibration: Iterable[Tensor]) -> list[Tensor]:
    """The batches as a list; `UserError` if there are none, or `model` cannot read one."""
    check_iterable("calibration", calibration, "a list of batches")
    batches = list(calibration)
    for batch in batches:
        _check_batch(model, batch)
    if not batches:
        raise UserError("calibration: it has no batches")
    return batches


def one_batch(batches: Sequence[Tensor]) -> Tensor:
    """All batches in one; `UserError` unless all have one length."""
    lengths = sorted({batch.shape[1] for batch in batches})
    if len(lengths) != 1:
        raise UserError(
            f"calibration: batches of lengths {lengths}; GPTQ and fitted transforms need one length"
        )
    return torch.cat(list(batches))


def run_batch(model: Any, batch: Tensor) -> None:
    """Run `model`, or its base model, on token ids, int64 [B, T], or on embeddings, [B, T, D]."""
    name = "inputs_embeds" if batch.is_floating_point() else "input_ids"
    model(**{name: batch.to(model.device)}, use_cache=False)


def _check_batch(model: PreTrainedModel, batch: Tensor) -> None:
    embedding: Any = model.get_input_embeddings()
    if not isinstance(batch, Tensor):
        raise UserError(
            f"calibration: a batch is of type {type(batch).__name__}, not a tensor of token ids,"
            " int64 [batch, tokens]"
        )
    width, shape = embedding.weight.shape[1], tuple(batch.shape)
    if batch.is_floating_point() and batch.ndim == 3 and shape[2] == width and batch.numel():
        return
    if batch.dtype != torch.int64 or batch.ndim != 2 or not batch.numel():
        raise UserError(
            f"calibration: a batch is {batch.dtype} {shape}, not token ids, int64 [batch, tokens],"
            f" or embeddings, [batch, tokens, {width}]"
        )
    vocabulary = model.config.get_text_config().vocab_size
    low, high = int(batch.min()), int(batch.max())
    if low < 0 or high >= vocabulary:
        raise UserError(
            f"calibration: token ids {low} .. {high} are not all in 0 .. {vocabulary - 1}"
        )
