"""Records that nothing was measured for."""

from __future__ import annotations

from typing import Any

from oasis_attn.records import (
    DiagnosisRecord,
    Environment,
    ModelInfo,
    QuantizationRecord,
    TextInfo,
)

ENVIRONMENT = Environment(
    versions={}, device="none", cores=1, threads=1, platform="none", commit=None
)
TEXT = TextInfo(
    corpus="made up",
    split="test",
    sha256="0",
    window=4,
    windows=2,
    stride=4,
    choice="spread",
    separator=None,
    bos=None,
    tokens_scored=6,
    tokens_sha256="same",
)


def model_info(name: str = "m", **changes: Any) -> ModelInfo:
    fields = {"family": "llama", "architecture": "A", "parameters": 1, "dtype": "float32"}
    return ModelInfo(name=name, **fields | changes)


def diagnosis(name: str = "m", **changes: Any) -> DiagnosisRecord:
    fields = {"model": model_info(name), "data": TEXT, "environment": ENVIRONMENT}
    return DiagnosisRecord(**fields | changes)


def quantization(name: str = "m", **changes: Any) -> QuantizationRecord:
    fields = {
        "model": model_info(name),
        "scheme": {"name": "w8a8"},
        "arithmetic": "int8",
        "targets": ("layers.0",),
        "transforms": {"layers.0": "Scale"},
        "prefix": (3,),
        "float_weights": {"layers.1.weight": 12},
        "rounded_to_nearest": ("layers.2",),
        "data": TEXT,
        "calibration": TEXT,
        "environment": ENVIRONMENT,
    }
    return QuantizationRecord(**fields | changes)
