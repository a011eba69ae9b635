"""transformers' Trainer, with the three things a run here needs beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from oasis_attn.errors import UserError
from oasis_attn.modeling.residual import DepthRouter
from oasis_attn.training.checkpoints import publish


class StagedTrainer(Trainer):
    """Trainer that decays matrices only, stops at a loss that is not finite, and publishes whole
    checkpoints, tokenizer included, from `args.output_dir` into the folder that holds it.
    """

    def __init__(self, *, run: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **kwargs: Any):
        super().__init__(**kwargs)
        # Not Trainer's processing_class, which would write its pad token, here also BOS, into the
        # model's config: embeddings neither initialise nor train the row of a pad token.
        self._tokenizer = tokenizer
        self._run = run

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The matrices, but for depth routers: their rows are one query and one norm each."""
        routers = (module for module in model.modules() if isinstance(module, DepthRouter))
        free = {id(parameter) for router in routers for parameter in router.parameters()}
        return [name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in free]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        norm = float(super()._get_grad_norm(model, grad_norm))
        # Any loss that is not finite gives such a gradient; the weights have not been touched yet.
        if not math.isfinite(norm):
            raise UserError(
                f"training: loss or gradient is not finite at step {self.state.global_step + 1}; "
                "checkpoints written before are whole; a lower learning_rate may help"
            )
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.state.global_step == self.state.max_steps:
            return  # the finished model is saved instead
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            staging = Path(str(self.args.output_dir))
            staged = staging / f"checkpoint-{self.state.global_step}"
            self._tokenizer.save_pretrained(staged)
            publish(staged, staging.parent, self._run)
