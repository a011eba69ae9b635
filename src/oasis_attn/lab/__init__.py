"""Small experiments on tasks for which attention sinks are necessary, trained in seconds.

Names that need torch are imported on first use, so that a plan can be checked without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from oasis_attn.lab.config import LAB_SIZES, DecoderTraining
from oasis_attn.lazy import import_on_first_use

if TYPE_CHECKING:
    from oasis_attn.lab.decoder import TrainedDecoder, decoder_backbone, predict, train_decoder
    from oasis_attn.lab.measure import attention_maps, measure_decoder, quantized_errors

_HOMES = {
    "TrainedDecoder": "oasis_attn.lab.decoder",
    "attention_maps": "oasis_attn.lab.measure",
    "decoder_backbone": "oasis_attn.lab.decoder",
    "measure_decoder": "oasis_attn.lab.measure",
    "predict": "oasis_attn.lab.decoder",
    "quantized_errors": "oasis_attn.lab.measure",
    "train_decoder": "oasis_attn.lab.decoder",
}

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

if not TYPE_CHECKING:  # type checkers would conclude that every name exists
    __getattr__ = import_on_first_use(__name__, _HOMES)
