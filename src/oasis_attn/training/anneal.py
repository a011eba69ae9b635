"""The road from a converted model to Softmax1: a null logit that rises to 0."""
# ruff: noqa: ARG002  the signatures are TrainerCallback's

from __future__ import annotations

from transformers import PreTrainedConfig, TrainerCallback

from oasis_attn.errors import UserError

HARMLESS = -12.0
"""A null logit at which a trained model's function is still its own.

What counts are the null's odds against a query, exp(c - lse).  Pretrained models keep the lse of
nearly all queries above 0, where this c leaves a null mass below 1e-5.  Further down, steps would
pass in which next to nothing changes.
"""


class NullAnneal(TrainerCallback):
    """Raises `null_logit` in equal parts over `steps` steps; the last of them trains at 0.

    The log-odds of the null grow evenly, so that each head gives way around its own lse.  The start
    is the model's own null logit, or `HARMLESS` where that is lower.  It is a function of the step
    alone and stands in the model's config, so that a checkpoint holds the value it was trained at.

    Raises:
        UserError: the model has no null logit below 0.
    """

    def __init__(self, config: PreTrainedConfig, steps: int):
        normalizer = getattr(config, "token_normalizer", "softmax")
        if normalizer != "softmax1":
            raise UserError(
                f"anneal_null: {steps} steps need a model with token_normalizer 'softmax1', and"
                f" this one has {normalizer!r}"
            )
        if config.null_logit >= 0:
            raise UserError(
                f"anneal_null: {steps} steps would raise a null logit to 0 that is at "
                f"{config.null_logit} already"
            )
        self.config = config
        self.steps = steps
        self.start = max(config.null_logit, HARMLESS)

    def at(self, step: int) -> float:
        """The null logit that step `step`, counted from 0, is trained at."""
        return min(0.0, self.start * (1 - (step + 1) / self.steps))

    def on_step_begin(self, args, state, control, **kwargs):
        self.config.null_logit = self.at(state.global_step)
