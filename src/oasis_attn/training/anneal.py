"""Raise the null logit of a converted model to 0, which is Softmax1, during training."""
# ruff: noqa: ARG002  the signatures are TrainerCallback's

from __future__ import annotations

from transformers import PreTrainedConfig, TrainerCallback

from oasis_attn.errors import UserError

LOWEST_START = -12.0
"""The lowest null logit that annealing starts from; it does not yet change a pretrained model.

The odds of the null for a query are exp(c - lse).  In pretrained models the lse of nearly all
queries is above 0, so that this c gives a null probability below 1e-5.  Starting lower would waste
steps in which almost nothing changes.
"""


class NullAnneal(TrainerCallback):
    """Raises `null_logit` linearly to 0 over `steps` steps; the last of them trains at 0.

    The log-odds of the null grow linearly, so that each head changes when c reaches its own lse.
    The start is the null logit of the model, but at least `LOWEST_START`.  The value depends only
    on the step and is stored in the model's config, so that a checkpoint contains it.

    Raises:
        UserError: the model does not use Softmax1, or its null logit is not below 0.
    """

    def __init__(self, config: PreTrainedConfig, steps: int):
        normalizer = getattr(config, "token_normalizer", "softmax")
        if normalizer != "softmax1":
            raise UserError(
                f"anneal_null: {steps} steps require a model with token_normalizer 'softmax1', but"
                f" it has {normalizer!r}"
            )
        if config.null_logit >= 0:
            raise UserError(
                f"anneal_null: {steps} steps require a null logit below 0, but the model has"
                f" {config.null_logit}"
            )
        self.config = config
        self.steps = steps
        self.start = max(config.null_logit, LOWEST_START)

    def at(self, step: int) -> float:
        """The null logit of step `step`, which counts from 0."""
        return min(0.0, self.start * (1 - (step + 1) / self.steps))

    def on_step_begin(self, args, state, control, **kwargs):
        self.config.null_logit = self.at(state.global_step)
