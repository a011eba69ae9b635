"""A trial of a decoder on a generated task: train, measure, quantize."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from oasis_attn.data.tasks import task_by_name
from oasis_attn.data.trigger import TriggerBatch
from oasis_attn.hub.model_info import describe_model
from oasis_attn.lab import (
    DecoderTraining,
    TrainedDecoder,
    measure_decoder,
    quantized_errors,
    train_decoder,
)
from oasis_attn.modeling.variants import settings_of
from oasis_attn.records import BlocksInfo, TextInfo, TrialRecord
from oasis_attn.study.plan import Trial

MEASURED_SEED, CALIBRATION_SEED = 2**32, 2**32 + 1
"""Seeds of the sequences to measure and to calibrate on; larger than any seed of a trial."""


def run_decoder_trial(trial: Trial, command: str) -> TrialRecord:
    """Train the decoder and measure it, unquantized and with each scheme."""
    return measure_trial(trial, train_trial(trial), command)


def train_trial(trial: Trial) -> TrainedDecoder:
    """Train the decoder of a trial."""
    settings = settings_of(trial.base) | dict(trial.overrides)
    task, training = task_by_name(trial.corpus), DecoderTraining(**trial.training)
    return train_decoder(trial.size, settings, task, training, seed=trial.seed)


def measured_batch(trial: Trial, seed: int = MEASURED_SEED) -> TriggerBatch:
    """The sequences that all trials on a task are measured on, or, by its seed, another batch."""
    return task_by_name(trial.corpus).batch(trial.windows, torch.Generator().manual_seed(seed))


def measure_trial(trial: Trial, trained: TrainedDecoder, command: str) -> TrialRecord:
    """Measure the decoder of a trial, unquantized and with each scheme."""
    training = DecoderTraining(**trial.training)
    measured, calibration = measured_batch(trial), measured_batch(trial, CALIBRATION_SEED)
    metrics, tables = measure_decoder(trained.model, measured)
    errors, targets = quantized_errors(trained.model, measured, calibration, trial.schemes)
    sequences = training.steps * training.batch_size
    return TrialRecord(
        model=replace(describe_model(trained.model), name=trial.id, variant=trial.variant),
        trial=trial.to_dict(),
        command=command,
        trained_parameters=trained.model.num_parameters(),
        targets=targets,
        tokenizer_sha256="",
        train=BlocksInfo(split="generated", blocks=sequences, sha256=trained.data_sha256),
        train_corpus_sha256=trained.data_sha256,
        data=_info(trial.corpus, measured),
        calibration_windows=trial.windows,
        seed=trial.seed,
        metrics=(*metrics, *errors),
        tables={"loss": trained.losses} | tables,
    )


def _info(task: str, batch: TriggerBatch) -> TextInfo:
    windows, length, _ = batch.x_BTN.shape
    return TextInfo(
        corpus=task,
        split=None,
        sha256=None,
        window=length,
        windows=windows,
        stride=length,
        choice="generated",
        separator=None,
        bos=None,
        tokens_scored=batch.targets[..., 0].numel(),
        tokens_sha256=hashlib.sha256(batch.x_BTN.numpy().tobytes()).hexdigest(),
    )
