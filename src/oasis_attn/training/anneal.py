"""Raise the null logit to its final value during training."""
# ruff: noqa: ARG002  the signatures are TrainerCallback's

from __future__ import annotations

from transformers import PreTrainedConfig, TrainerCallback

from oasis_attn.errors import UserError
from oasis_attn.modeling.configuration_oasis import OasisConfig

LOWEST_START = -12.0
"""The lowest null logit that annealing starts from; it does not yet change a pretrained model.

The odds of the null for a query are exp(c - lse).  In pretrained models the lse of nearly all
queries is above 0, so that this c gives a null probability below 1e-5.  Starting lower would waste
steps in which almost nothing changes.
"""


class NullAnneal(TrainerCallback):
    """Raises `null_logit` linearly to `target` over `steps` steps; the last of them trains at it.

    The log-odds of the null grow linearly, so that each head changes when c reaches its own lse.
    The value depends only on the step and is stored in the model's config, so that a checkpoint
    contains it.

    Args:
        config: the model's `OasisConfig`.
        steps: number of steps.
        target: the final null logit.  0 is Softmax1.
        start: the first null logit, but at least `LOWEST_START`.

    Raises:
        UserError: the model does not use Softmax1, or the start is not below the target.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        steps: int,
        *,
        target: float = 0.0,
        start: float = LOWEST_START,
    ):
        normalizer = config.normalizer.name if isinstance(config, OasisConfig) else "softmax"
        if normalizer != "softmax1":
            raise UserError(
                f"anneal_null: {steps} steps require a model with token_normalizer 'softmax1', but"
                f" it has {normalizer!r}"
            )
        start = max(start, LOWEST_START)
        if start >= target:
            raise UserError(
                f"anneal_null: {steps} steps to the null logit {target} require a start below it,"
                f" but they start at {start}"
            )
        self.config = config
        self.steps = steps
        self.start, self.target = start, target

    def at(self, step: int) -> float:
        """The null logit of step `step`, which counts from 0."""
        if step + 1 >= self.steps:
            return self.target
        return self.start + (self.target - self.start) * (step + 1) / self.steps

    def on_step_begin(self, args, state, control, **kwargs):
        self.config.null_logit = self.at(state.global_step)
