"""The kinds of records.  Whoever changes the fields of a kind raises its `version`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from oasis_attn.records.base import Record
from oasis_attn.records.infos import BlocksInfo, ModelInfo, TextInfo, TrainingData


@dataclass(frozen=True, kw_only=True)
class BenchmarkRecord(Record):
    """Numbers of one of the project's own benchmarks.

    Attributes:
        name: of the benchmark.
        settings: what else decides its numbers.
        data: the text or commands behind them.
    """

    kind = "benchmark"

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelRecord(Record):
    """A record of one model; see the subclasses."""

    model: ModelInfo


@dataclass(frozen=True, kw_only=True)
class DiagnosisRecord(ModelRecord):
    """What `diagnose` measured on the windows `data`."""

    kind = "diagnosis"
    version = 2

    data: TextInfo


@dataclass(frozen=True, kw_only=True)
class TrainingRecord(ModelRecord):
    """A finished training run.

    Attributes:
        trained_parameters: how many of the model's parameters were trained.
        weights_sha256: hash of the weights that training started from; None for random ones.
        training: the fields of `TrainingConfig` that decide the result.
        processes: that shared every step.
        data: what it was trained and measured on.
    """

    kind = "training"
    version = 2

    trained_parameters: int
    weights_sha256: str | None
    training: dict[str, Any]
    processes: int
    data: TrainingData


class _BeforeAfter(ModelRecord):
    """Metrics are at `before` or `after` what was done to the model, or of both together."""

    def before_after(self, name: str) -> tuple[float, float]:
        """The values of a metric before and after."""
        return self.metric(name, "before").value, self.metric(name, "after").value


@dataclass(frozen=True, kw_only=True)
class QuantizationRecord(_BeforeAfter):
    """A model `before` and `after` quantization.

    Attributes:
        model: before quantization.
        scheme: `Scheme.to_dict()`.
        arithmetic: `simulated` in floating point, or `int8`.
        targets: names of the tensors that are quantized.
        transforms: what is applied to the inputs of linear layers, by layer.
        prefix: tokens of the model's prefix; empty without one.
        float_weights: number of entries of each weight that stays in floating point.
        rounded_to_nearest: layers that GPTQ had no calibration token for.
        data: the windows that were measured on.
        calibration: the windows that ranges and weights were calibrated on.
    """

    kind = "quantization"
    version = 2

    scheme: dict[str, Any]
    arithmetic: str
    targets: tuple[str, ...]
    transforms: dict[str, str]
    prefix: tuple[int, ...]
    float_weights: dict[str, int]
    rounded_to_nearest: tuple[str, ...]
    data: TextInfo
    calibration: TextInfo


@dataclass(frozen=True, kw_only=True)
class PrefixRecord(_BeforeAfter):
    """A model `before` and `after` it was given a prefix.

    Attributes:
        tokens, text: of the prefix.
        method: that found it.
        tune_steps: training steps of its keys and values.
        scheme: `Scheme.to_dict()` of the quantization that it was judged by.
        data: the windows that were measured on.
        calibration: the windows that the prefix was searched and tuned, and ranges calibrated, on.
    """

    kind = "prefix"
    version = 2

    tokens: tuple[int, ...]
    text: str
    method: str
    tune_steps: int
    scheme: dict[str, Any]
    data: TextInfo
    calibration: TextInfo


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(ModelRecord):
    """How well a model predicts text and solves problems.

    Attributes:
        sha256: `fingerprint` of the model.
        model_notes: what the caller adds about the model, its cache for example.
        data: by task, the text and how it was read.
        intervals: by metric, the ends of its 95 % interval.
    """

    kind = "evaluation"

    sha256: str
    model_notes: dict[str, Any] = field(default_factory=dict)
    data: dict[str, dict[str, Any]]
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class TrialRecord(ModelRecord):
    """One trial of a study: a model trained, measured, quantized and evaluated.

    Attributes:
        trial: the fields of the trial in the plan.
        command: runs the trial again.
        trained_parameters: how many of the model's parameters were trained.
        targets: by scheme, how many tensors are quantized.
        tokenizer_sha256: hash of the tokenizer; empty for a generated task, which has none.
        train: the blocks (of a generated task, the sequences) that it was trained on.
        train_corpus_sha256: hash of their text (of a generated task, of the sequences).
        data: the windows that were measured on.
        calibration_windows: how many others quantization was calibrated on.
    """

    kind = "trial"
    version = 2

    trial: dict[str, Any]
    command: str
    trained_parameters: int
    targets: dict[str, int]
    tokenizer_sha256: str
    train: BlocksInfo
    train_corpus_sha256: str
    data: TextInfo
    calibration_windows: int
