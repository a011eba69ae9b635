"""What a training run is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from oasis_attn.errors import UserError, check_at_least


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One run: a backbone of some size, as some variant, on some corpus, from scratch.

    Attributes:
        out: the folder the model, its tokenizer, `record.json` and `checkpoints/` are written to.
        variant: a name in `variants()`.
        size: a name in `SIZES`, or a Hugging Face configuration file.
        corpus: a name in `CORPORA`, or a text file or folder.
        settings: `OasisConfig` settings that override the variant's.
        steps: optimiser steps.
        seed: of the initialisation and of the data order; both are the same for every variant.
        block_length: tokens per sequence.
        batch_size: sequences per device and forward pass.
        gradient_accumulation: forward passes per step.
        learning_rate: at its peak; the schedule is a linear warmup and a cosine to 0.
        warmup: share of the steps, in [0, 1].
        weight_decay: AdamW's, on matrices only.
        clip: largest norm of the gradient.
        bf16: bfloat16 autocast; weights stay float32.
        vocab_size: of the tokenizer learnt from the corpus; default, the size's.
        save_every: steps between checkpoints, a multiple of `log_every`.
        log_every: steps that one row of the loss table is the mean of.
        eval_split: split of the corpus that the final loss is measured on.
        eval_windows: at most this many blocks of it.
        resume: go on from the last whole checkpoint in `out`; a finished run is left as it is.

    Raises:
        UserError: at construction, for any value outside what is said above.
    """

    out: str | Path
    variant: str = "oasis"
    size: str = "nano"
    corpus: str = "stdlib"
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1000
    seed: int = 0
    block_length: int = 256
    batch_size: int = 16
    gradient_accumulation: int = 1
    learning_rate: float = 2e-3
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
        from oasis_attn.modeling.sizes import text_config
        from oasis_attn.modeling.variants import settings_of

        settings_of(self.variant)
        text_config(self.size, self.vocab_size)
        lowest = {
            "steps": 1,
            "seed": 0,
            "block_length": 2,
            "batch_size": 1,
            "gradient_accumulation": 1,
            "save_every": 1,
            "log_every": 1,
            "eval_windows": 1,
        }
        for name, least in lowest.items():
            value = getattr(self, name)
            check_at_least(name, value, least)
            if not isinstance(value, int):
                raise UserError(f"{name}: {value!r} is not a whole number")
        for name in ("learning_rate", "warmup", "weight_decay", "clip"):
            check_at_least(name, getattr(self, name), 0)
        if self.warmup > 1:
            raise UserError(f"warmup: {self.warmup!r} is a share of the steps, at most 1")
        if not self.clip:
            raise UserError(f"clip: {self.clip!r} is not above 0")
        if self.save_every % self.log_every:
            # Else the mean that a checkpoint interrupts would not be the uninterrupted run's.
            raise UserError(
                f"save_every: {self.save_every!r} is not a multiple of log_every={self.log_every!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """What decides the result: all but `out` and `resume`, as JSON takes it."""
        fields = asdict(self) | {"size": str(self.size), "corpus": str(self.corpus)}
        return {name: value for name, value in fields.items() if name not in ("out", "resume")}
