"""The record of a quantized model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from oasis_attn.hub.model_info import describe_model
from oasis_attn.hub.prefix import prefix_of
from oasis_attn.quantization.coverage import float_weights, rounded_to_nearest
from oasis_attn.quantization.hf_quantizer import get_quantization_config
from oasis_attn.records import QuantizationRecord, TextInfo, current_environment


def quantization_record(
    before: PreTrainedModel,
    after: PreTrainedModel,
    *,
    data: TextInfo,
    calibration: TextInfo,
    **measured: Any,
) -> QuantizationRecord:
    """Describe a quantized model.

    Args:
        before, after: the model in floating point, and its quantized copy.
        data: the text on which both were measured.
        calibration: the text on which `after` was calibrated.
        measured: the fields `seed`, `metrics`, `tables`, `fallback` and `kv_cache` of the record,
            and `arithmetic` if it is not that of `after`.
    """
    stored, prefix = get_quantization_config(after), prefix_of(after)
    return QuantizationRecord(
        environment=current_environment(after.device),
        model=describe_model(before),
        scheme=stored.scheme,
        targets=tuple(stored.targets),
        transforms=stored.transforms,
        prefix=() if prefix is None else tuple(prefix.tokens),
        float_weights=float_weights(after),
        rounded_to_nearest=tuple(rounded_to_nearest(after)),
        data=data,
        calibration=calibration,
        **{"arithmetic": stored.arithmetic} | measured,
    )
