"""The configuration of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from oasis_attn.devices import check_device
from oasis_attn.errors import (
    UserError,
    check_at_least,
    check_choice,
    check_flag,
    check_path,
    check_seed,
    check_type,
    check_whole,
)
from oasis_attn.hub.model_sizes import check_size, text_config
from oasis_attn.modeling.settings import check_settings
from oasis_attn.modeling.variants import settings_of
from oasis_attn.training.parameters import GROUPS, check_learning_rates, check_patterns

OUTLIER_TENSORS = ("linear_inputs", "layer_outputs")
SERVICES = {
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "tensorboard": ("tensorboard", "tensorboardX"),
}
"""Where `report_to` can log -> the packages of which one must be installed."""
_NO_EFFECT_ON_RESULT = ("out", "device", "report_to", "resume", "trust_remote_code")
_FROM_SCRATCH, _FROM_MODEL = 2e-3, 1e-4  # learning rates
_VARIANT, _SIZE = "oasis", "nano"  # of a model from scratch
_LARGEST = 1e6
"""Largest learning rate or weight: above it, a step is not finite in float32."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training run: a variant of a backbone from scratch, or an existing model.

    Attributes:
        out: folder for the model, its tokenizer, `record.json` and `checkpoints/`.
        from_model: an existing model to train, for `load_model`: an OASIS or a native model, with
            its own tokenizer.  Its variant, size, settings and vocabulary are used.
        device: `cpu`, `cuda`, or `auto` for the GPUs if there are any.
        trust_remote_code: run Python code from the checkpoint of `from_model`; see `load_model`.
        variant: a name in `variants()`.  Default oasis, and none with `from_model`.
        size: a name in `SIZES`, or a Hugging Face configuration file.  Default nano, and none with
            `from_model`.
        corpus: a name in `CORPORA`, or a text file or folder.
        settings: settings of `OasisConfig` that replace those of the variant.  With `from_model`,
            only `null_logit` can be given, together with `anneal_null`.
        steps: number of optimizer steps.
        seed: random seed of the initialization and the data order, which are equal for all
            variants.
        block_length: tokens per sequence.
        batch_size: sequences per process and forward pass.
        gradient_accumulation: forward passes per step.
        learning_rate: peak learning rate (linear warmup, cosine decay to 0).  Default 2e-3 from
            scratch, 1e-4 for an existing model.
        learning_rates: peak learning rates of parameter groups; see `training.parameters.GROUPS`.
        trainable: train only parameters whose name matches one of these shell patterns, or that
            belong to a group with this name; default: all.
        lora_rank: if above 0, train the backbone of `from_model` with LoRA adapters of this rank
            (needs peft); at the end the adapters are merged into the weights.
        anneal_null: if above 0, raise the null logit over this many steps to that of the variant
            and `settings`; with `from_model`, from the model's own to that of `settings`, default
            0.  See `NullAnneal`.
        null_to_logit: if above 0, turn the key-and-value nulls of `from_model` into plain nulls
            over this many steps.  See `NullToLogit`.
        distill_from: a model for `load_model`, with the same tokenizer: the loss becomes the
            Kullback-Leibler divergence of its next-token distributions from the trained model's.
        distill_weight: w in w * divergence + (1 - w) * next-token loss, with `distill_from`.
        outlier_penalty: weight of `OutlierPenalty`, in nats, added to the loss.
        outlier_tensors: `linear_inputs` or `layer_outputs`, see `OutlierPenalty`.
        activation_checkpointing: recompute each layer in backward instead of storing activations.
        warmup: share of the steps for the warmup, in [0, 1].
        weight_decay: weight decay of AdamW, for matrices only.
        clip: maximum gradient norm.
        bf16: use bfloat16 autocast; weights stay float32.
        vocab_size: vocabulary of the tokenizer trained on the corpus; default: that of the size,
            or of a corpus of a task, which has one vocabulary.
        save_every: steps between checkpoints, a multiple of `log_every`.
        log_every: steps that one row of the loss table is the mean of.
        eval_split: split of the corpus that the final loss is measured on.
        eval_windows: maximum number of windows, which are spread over that split.
        report_to: also log to `wandb`, `trackio` or `tensorboard` (files in `out/tensorboard`).
        resume: continue from the last complete checkpoint in `out`; a finished run is not changed.

    Raises:
        UserError: at construction, if a value is invalid.
    """

    out: str | Path
    from_model: str | Path | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    variant: str | None = None
    size: str | Path | None = None
    corpus: str = "stdlib"
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1000
    seed: int = 0
    block_length: int = 256
    batch_size: int = 16
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    trainable: Sequence[str] | None = None
    lora_rank: int = 0
    anneal_null: int = 0
    null_to_logit: int = 0
    distill_from: str | Path | None = None
    distill_weight: float = 1.0
    outlier_penalty: float = 0.0
    outlier_tensors: str = "linear_inputs"
    activation_checkpointing: bool = False
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    bf16: bool = False
    vocab_size: int | None = None
    save_every: int = 500
    log_every: int = 10
    eval_split: str = "validation"
    eval_windows: int = 64
    report_to: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        check_path("out", self.out)
        check_type("settings", self.settings, Mapping, "a mapping from settings to values")
        lowest = {
            "steps": 1,
            "block_length": 2,
            "batch_size": 1,
            "gradient_accumulation": 1,
            "save_every": 1,
            "log_every": 1,
            "eval_windows": 1,
            "lora_rank": 0,
            "anneal_null": 0,
            "null_to_logit": 0,
        }
        for name, least in lowest.items():
            check_whole(name, getattr(self, name), least)
        if self.from_model is not None:
            self._check_unused("variant", "size", "vocab_size")
            if not self.anneal_null or set(self.settings) - {"null_logit"}:
                self._check_unused("settings")
        check_seed("seed", self.seed)
        check_device(self.device)
        if ":" in self.device:
            raise UserError(
                f"device: {self.device!r} is one of several GPUs; training uses all that are"
                " visible, so set CUDA_VISIBLE_DEVICES; allowed here: auto, cpu, cuda"
            )
        for name in ("bf16", "activation_checkpointing", "resume", "trust_remote_code"):
            check_flag(name, getattr(self, name))
        for name in ("warmup", "distill_weight"):
            check_at_least(name, getattr(self, name), 0, 1)
        if self.distill_from is None and self.distill_weight != type(self).distill_weight:
            raise UserError(
                f"distill_weight: {self.distill_weight!r} has no effect without distill_from"
            )
        for name in ("weight_decay", "clip", "outlier_penalty"):
            check_at_least(name, getattr(self, name), 0, _LARGEST)
        check_choice("outlier_tensors", self.outlier_tensors, OUTLIER_TENSORS)
        if not self.outlier_penalty and self.outlier_tensors != type(self).outlier_tensors:
            raise UserError(
                f"outlier_tensors: {self.outlier_tensors!r} has no effect without outlier_penalty"
            )
        if self.lora_rank and self.from_model is None:
            raise UserError(
                f"lora_rank: {self.lora_rank!r} needs from_model, because adapters leave the"
                " backbone as it is, and that of a new model is random"
            )
        if self.null_to_logit and self.from_model is None:
            raise UserError(
                f"null_to_logit: {self.null_to_logit!r} needs from_model, a model whose nulls have"
                " values"
            )
        check_learning_rates(self.learning_rates, _LARGEST)
        check_at_least("learning_rate", self._rate, 0, _LARGEST)
        for name in ("anneal_null", "null_to_logit"):
            if getattr(self, name) > self.steps:
                raise UserError(
                    f"{name}: {getattr(self, name)!r} is more than the run's {self.steps} steps"
                )
        if self.trainable is not None:
            check_patterns(self.trainable)
        if not self.clip:
            raise UserError(f"clip: {self.clip!r} is not above 0")
        if self.save_every % self.log_every:
            # Otherwise resuming would change the mean loss of the row that a checkpoint interrupts.
            raise UserError(
                f"save_every: {self.save_every!r} is not a multiple of log_every={self.log_every!r}"
            )
        if self.report_to is not None:
            check_choice("report_to", self.report_to, SERVICES)
            _check_installed(self.report_to)
        self._check_model()

    def _check_model(self) -> None:
        variant, size = self.new_model
        settings = settings_of(variant) | dict(self.settings)
        check_settings(settings)
        check_size(size, self.vocab_size)
        # These imports take seconds; all other checks come first.
        from oasis_attn.modeling.configuration_oasis import OasisConfig
        from oasis_attn.modeling.families import check_fits

        check_fits(OasisConfig(text_config=text_config(size, self.vocab_size), **settings))

    @property
    def new_model(self) -> tuple[str, str | Path]:
        """The variant and the size of a model from scratch."""
        variant = _VARIANT if self.variant is None else self.variant
        return variant, _SIZE if self.size is None else self.size

    @property
    def rates(self) -> dict[str, float]:
        """The peak learning rate of every group."""
        return dict.fromkeys(GROUPS, self._rate) | dict(self.learning_rates)

    @property
    def _rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return _FROM_SCRATCH if self.from_model is None else _FROM_MODEL

    def to_dict(self) -> dict[str, Any]:
        """The fields that affect the result, as values that JSON supports."""
        variant, size = (None, None) if self.from_model is not None else self.new_model
        plain = asdict(self) | {
            "from_model": None if self.from_model is None else str(self.from_model),
            "distill_from": None if self.distill_from is None else str(self.distill_from),
            "variant": variant,
            "size": None if size is None else str(size),
            "corpus": str(self.corpus),
            "learning_rate": self._rate,
            "trainable": list(self.trainable or ()),
        }
        return {name: value for name, value in plain.items() if name not in _NO_EFFECT_ON_RESULT}

    def _check_unused(self, *names: str) -> None:
        """Raise `UserError` for a field that has no effect together with `from_model`."""
        for option in fields(self):
            default = option.default
            if option.default_factory is not MISSING:
                default = option.default_factory()
            value = getattr(self, option.name)
            changed = value is not None if default is None else value != default
            if option.name in names and changed:
                raise UserError(
                    f"{option.name}: {value!r} has no effect with from_model="
                    f"{str(self.from_model)!r}, because the model has its own; `oasis convert`"
                    " changes the variant of a model"
                )


def _check_installed(service: str) -> None:
    """Raise `UserError` if the package of `service` is missing.

    Its metadata tell; `wandb` also leaves a folder of its name, which Python could import.
    """
    for package in SERVICES[service]:
        try:
            distribution(package)
        except PackageNotFoundError:
            continue
        return
    package = SERVICES[service][0]
    raise UserError(f"report_to: {service!r} is not installed; run: pip install {package}")
