"""The kinds of records.  If the fields of a kind change, its `version` must be raised."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from oasis_attn.records.base import Record
from oasis_attn.records.infos import BlocksInfo, ModelInfo, TextInfo, TrainingData, Try
from oasis_attn.records.schema import OPTIONAL


@dataclass(frozen=True, kw_only=True)
class BenchmarkRecord(Record):
    """Numbers of one of the project's own benchmarks.

    Attributes:
        name: name of the benchmark.
        settings: all other settings that determine the numbers.
        data: the text that was read, or the commands that were run.
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
        trained_parameters: number of the model's parameters that were trained.
        weights_sha256: hash of the weights that training started from; None for random ones.
        training: the fields of `TrainingConfig` that decide the result.
        processes: number of processes that shared every step.
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
    """Each metric is measured `before` or `after` a change of the model, or compares the two."""

    def before_after(self, name: str) -> tuple[float, float]:
        """The values of a metric before and after."""
        return self.metric(name, "before").value, self.metric(name, "after").value


@dataclass(frozen=True, kw_only=True)
class QuantizationRecord(_BeforeAfter):
    """A model `before` and `after` quantization.

    Attributes:
        model: the model before quantization.
        scheme: `Scheme.to_dict()`.
        arithmetic: `simulated` in floating point, `int8`, or `compressed-tensors` or `torchao` for
            a folder in this format as transformers loads it.
        fallback: why `--format auto` wrote the format `oasis`; empty if it did not.
        kv_cache: the format of the key-value cache, `fp8`; empty if it is not quantized.
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
    fallback: str = field(default="", metadata=OPTIONAL)
    kv_cache: str = field(default="", metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class PrefixRecord(_BeforeAfter):
    """A model `before` and `after` it was given a prefix.

    Attributes:
        tokens, text: the tokens of the prefix, and their text.
        method: the method that found it.
        tune_steps: training steps of its keys and values.
        scheme: `Scheme.to_dict()` of the scheme that its effect was measured with.
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
class DoctorRecord(ModelRecord):
    """What `doctor` has tried so far.

    A metric of a try has its name as `where`; without `where`, it is of the unquantized model.

    Attributes:
        sha256: `fingerprint` of the model.
        scheme: `Scheme.to_dict()` of the scheme that the remedies change.
        tolerance: the largest increase of perplexity, relative to the unquantized model, that is
            good enough.
        tries: the tries, in their order.
        data: the windows that were measured on.
        calibration: the windows for calibration and for the search of a prefix.
    """

    kind = "doctor"

    sha256: str
    scheme: dict[str, Any]
    tolerance: float
    tries: tuple[Try, ...]
    data: TextInfo
    calibration: TextInfo


@dataclass(frozen=True, kw_only=True)
class ConversionRecord(_BeforeAfter):
    """A model `before` and `after` its attention sink was moved into a null.

    Attributes:
        model: the model before conversion.
        config: the settings of the converted model.
        nulls: number of nulls of each head.
        bos: the text of BOS if the first null was made from it; None if from the mean of words.
            With it, the texts `after` are without BOS, and the losses before and after are those of
            all tokens of the text but the first.
        layer_0: the token whose key and value the first null has in layer 0; None if it has no
            other token there than in the other layers.
        tokens, texts: the tokens that the nulls after the first were made from, and their texts.
        neurons: the layer and the unit of each MLP neuron that was pruned.
        data: the windows that were measured on; with `bos`, those before conversion.
        calibration: the windows that the nulls were computed from, before BOS was removed.
    """

    kind = "conversion"
    version = 3

    config: dict[str, Any]
    nulls: int
    bos: str | None
    layer_0: str | None
    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    neurons: tuple[tuple[int, int], ...]
    data: TextInfo
    calibration: TextInfo


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(ModelRecord):
    """How well a model predicts text and solves problems.

    Attributes:
        sha256: `fingerprint` of the model.
        model_notes: more information about the model from the caller, for example its cache.
        data: for each task, the text and the protocol by which it was read.
        intervals: for each metric, the ends of its 95 % interval.
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
        command: the command that runs the trial again.
        trained_parameters: number of the model's parameters that were trained.
        targets: for each scheme, the number of quantized tensors.
        tokenizer_sha256: hash of the tokenizer; empty for a generated task, which has none.
        train: the blocks (of a generated task, the sequences) that it was trained on.
        train_corpus_sha256: hash of their text (of a generated task, of the sequences).
        data: the windows that were measured on.
        calibration_windows: number of other windows, which quantization was calibrated on.
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
