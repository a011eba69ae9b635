"""What a training run is asked to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from oasis_attn.errors import (
    UserError,
    check_at_least,
    check_choice,
    check_flag,
    check_seed,
    check_whole,
    shown,
)
from oasis_attn.training.parameters import GROUPS

_NOT_DECIDING = ("out", "resume", "trust_remote_code")
_FROM_SCRATCH, _FROM_MODEL = 2e-3, 1e-4  # learning rates
_LARGEST = 1e6
"""Of rates and weights: beyond, a step is not finite in float32."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One run: a backbone of some size, as some variant, from scratch; or a model that exists.

    Attributes:
        out: the folder the model, its tokenizer, `record.json` and `checkpoints/` are written to.
        from_model: train this model on, as `load_model` takes it: ours or a native one, with its
            own tokenizer.  It brings its variant, size, settings and vocabulary.
        trust_remote_code: let Python code that comes with `from_model` run, see `load_model`.
        variant: a name in `variants()`.
        size: a name in `SIZES`, or a Hugging Face configuration file.
        corpus: a name in `CORPORA`, or a text file or folder.
        settings: `OasisConfig` settings that override the variant's.
        steps: optimiser steps.
        seed: of the initialisation and of the data order; both are the same for every variant.
        block_length: tokens per sequence.
        batch_size: sequences per process and forward pass.
        gradient_accumulation: forward passes per step.
        learning_rate: at its peak; the schedule is a linear warmup and a cosine to 0.  Default
            2e-3 from scratch, 1e-4 for a model that exists.
        learning_rates: peaks of single groups of parameters, see `training.parameters.GROUPS`.
        trainable: train only parameters whose names match one of these shell patterns, or that
            belong to a group so named; none: all.
        lora_rank: above 0, the backbone learns through LoRA adapters of this rank (needs peft),
            which the finished model has added to its weights.
        anneal_null: above 0, the null logit rises over this many steps to 0, see `NullAnneal`.
        outlier_penalty: weight, in nats, of `OutlierPenalty` beside the loss.
        activation_checkpointing: recompute each layer in backward instead of keeping what it did.
        warmup: share of the steps, in [0, 1].
        weight_decay: AdamW's, on matrices only.
        clip: largest norm of the gradient.
        bf16: bfloat16 autocast; weights stay float32.
        vocab_size: of the tokenizer learnt from the corpus; default, the size's.
        save_every: steps between checkpoints, a multiple of `log_every`.
        log_every: steps that one row of the loss table is the mean of.
        eval_split: split of the corpus that the final loss is measured on.
        eval_windows: maximum number of windows, which are spread over that split.
        resume: go on from the last whole checkpoint in `out`; a finished run is left as it is.

    Raises:
        UserError: at construction, for any value outside what is said above.
    """

    out: str | Path
    from_model: str | Path | None = None
    trust_remote_code: bool = False
    variant: str = "oasis"
    size: str = "nano"
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
    outlier_penalty: float = 0.0
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
    resume: bool = False

    def __post_init__(self) -> None:
        if self.from_model is not None:
            self._check_unused("variant", "size", "settings", "vocab_size")
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
        }
        for name, least in lowest.items():
            check_whole(name, getattr(self, name), least)
        check_seed("seed", self.seed)
        for name in ("bf16", "activation_checkpointing", "resume", "trust_remote_code"):
            check_flag(name, getattr(self, name))
        check_at_least("warmup", self.warmup, 0, 1)
        for name in ("weight_decay", "clip", "outlier_penalty"):
            check_at_least(name, getattr(self, name), 0, _LARGEST)
        if not isinstance(self.learning_rates, Mapping):
            raise UserError(
                f"learning_rates: {shown(self.learning_rates)} does not map groups to rates"
            )
        for group, rate in self.learning_rates.items():
            check_choice("learning_rates", group, GROUPS)
            check_at_least(f"learning_rates[{group!r}]", rate, 0, _LARGEST)
        check_at_least("learning_rate", self._rate, 0, _LARGEST)
        if self.anneal_null > self.steps:
            raise UserError(
                f"anneal_null: {self.anneal_null!r} is more than the run's {self.steps} steps"
            )
        patterns = self.trainable or ()
        if isinstance(patterns, str) or not (
            isinstance(patterns, Sequence) and all(isinstance(name, str) for name in patterns)
        ):
            raise UserError(f"trainable: {shown(self.trainable)} is not a list of patterns")
        if not self.clip:
            raise UserError(f"clip: {self.clip!r} is not above 0")
        if self.save_every % self.log_every:
            # Else the mean that a checkpoint interrupts would not be the uninterrupted run's.
            raise UserError(
                f"save_every: {self.save_every!r} is not a multiple of log_every={self.log_every!r}"
            )
        self._check_model()

    def _check_model(self) -> None:
        # These imports take seconds; all other checks come first.
        from oasis_attn.modeling.configuration import OasisConfig, check_settings
        from oasis_attn.modeling.families import check_fits
        from oasis_attn.modeling.sizes import text_config
        from oasis_attn.modeling.variants import settings_of

        check_settings(self.settings)
        settings = settings_of(self.variant) | dict(self.settings)
        check_fits(OasisConfig(text_config=text_config(self.size, self.vocab_size), **settings))

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
        """What decides the result, as JSON takes it."""
        plain = asdict(self) | {
            "from_model": None if self.from_model is None else str(self.from_model),
            "size": str(self.size),
            "corpus": str(self.corpus),
            "learning_rate": self._rate,
            "trainable": list(self.trainable or ()),
        }
        return {name: value for name, value in plain.items() if name not in _NOT_DECIDING}

    def _check_unused(self, *names: str) -> None:
        """Refuse settings that `from_model` leaves without effect."""
        for option in fields(self):
            default = option.default
            if option.default_factory is not MISSING:
                default = option.default_factory()
            value = getattr(self, option.name)
            if option.name in names and value != default:
                raise UserError(
                    f"{option.name}: {value!r} has no effect with from_model="
                    f"{str(self.from_model)!r}, which has its own"
                )
