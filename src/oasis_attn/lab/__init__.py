"""Small experiments on tasks for which attention sinks are necessary, trained in seconds."""

from __future__ import annotations

from oasis_attn.lab.decoder import (
    LAB_SIZES,
    DecoderTraining,
    TrainedDecoder,
    decoder_backbone,
    predict,
    train_decoder,
)
from oasis_attn.lab.measure import attention_maps, measure_decoder, quantized_errors

__all__ = [
    "LAB_SIZES",
    "DecoderTraining",
    "TrainedDecoder",
    "attention_maps",
    "decoder_backbone",
    "measure_decoder",
    "predict",
    "quantized_errors",
    "train_decoder",
]
