"""Sizes of decoders, and how they are trained.  This module does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from oasis_attn.errors import check_at_least, check_flag, check_whole
from oasis_attn.training.parameters import check_learning_rates, check_patterns

LAB_SIZES: Mapping[str, int] = MappingProxyType({f"lab-{n}": n for n in (1, 2, 4, 8, 16)})
"""Sizes of decoders by name: number of layers.  All have width 64 and 2 heads."""
_LAST_RATE = 0.1


@dataclass(frozen=True, kw_only=True)
class DecoderTraining:
    """How a decoder is trained: AdamW, on new sequences in each step.

    Attributes:
        steps: number of optimizer steps.
        batch_size: sequences per step.
        learning_rate: peak learning rate; linear warm-up, then cosine decay to a tenth of it.
        learning_rates: peak learning rates of parameter groups; see `training.parameters.GROUPS`.
        warmup_steps: steps of the warm-up.
        weight_decay: weight decay of the group `backbone`, the gains of norms included.
        rotary: whether attention has rotary position embeddings; without them, only the causal mask
            tells positions apart.
        trainable: patterns of the parameters that are trained: see `training.parameters.train_only`
            (all if empty).

    Raises:
        UserError: a value is not allowed.
    """

    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 3e-3
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    warmup_steps: int = 100
    weight_decay: float = 0.0
    rotary: bool = False
    trainable: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, 1)
        check_whole("batch_size", self.batch_size, 1)
        check_at_least("learning_rate", self.learning_rate, 0)
        check_learning_rates(self.learning_rates)
        check_whole("warmup_steps", self.warmup_steps, 0)
        check_at_least("weight_decay", self.weight_decay, 0)
        check_flag("rotary", self.rotary)
        check_patterns(self.trainable)

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0, as a fraction of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2
