"""The Trainer of transformers with parameter groups, the outlier penalty and safe checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from oasis_attn.errors import UserError
from oasis_attn.files import writing
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.depth_cache import DepthRouter
from oasis_attn.modeling.hf_compat import SAFE_WEIGHTS_NAME, parse_flag_from_env
from oasis_attn.ops.divergence import divergence
from oasis_attn.training.checkpoints import publish
from oasis_attn.training.null_to_logit import NullToLogit
from oasis_attn.training.outliers import OutlierPenalty
from oasis_attn.training.parameters import GROUPS, group_of, trained


class OasisTrainer(Trainer):
    """The Trainer with additions for `train`.

    It has a learning rate per parameter group and a penalty on outliers, applies weight decay to
    matrices only, and stops if the loss is not finite.  Complete checkpoints, with the tokenizer,
    are moved from `args.output_dir` to its parent folder.

    Args:
        model: the model to train.
        run: identity of the run, stored in its checkpoints.
        tokenizer: saved with each checkpoint.
        rates: peak learning rate of each group in `GROUPS`.
        penalty: weight of `OutlierPenalty` in the objective; the logged loss does not include it.
        penalized: the tensors that `OutlierPenalty` reads.
        teacher: a model to distill from, with frozen weights.
        distill_weight: w in w * divergence from the teacher + (1 - w) * next-token loss.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        run: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        rates: Mapping[str, float],
        penalty: float = 0.0,
        penalized: str = "linear_inputs",
        teacher: PreTrainedModel | None = None,
        distill_weight: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(model=model, **kwargs)
        self._whole = model
        self._adapted = any(group_of(name) == "lora" for name, _ in model.named_parameters())
        # Not passed as processing_class: the Trainer would copy its pad token, which is also BOS,
        # to the model's config, and the embedding row of a pad token is not trained.
        self._tokenizer = tokenizer
        self._run = run
        self._rates = rates
        self._teacher = teacher
        self._distill_weight = distill_weight
        if self._teacher is not None:
            self._teacher.to(self.args.device)  # type: ignore[arg-type]
        self.loss_is_scaled_for_ga = True  # see `_loss`
        self._weight = penalty
        self._penalty = OutlierPenalty(model, penalized) if penalty else None
        self._penalties: list[Tensor] = []  # one per forward pass since the last log

    def create_accelerator_and_postprocess(self) -> None:
        """As in the Trainer, but FSDP on CPUs is not silently ignored."""
        state = PartialState()
        if (
            parse_flag_from_env("ACCELERATE_USE_FSDP")
            and state.distributed_type is DistributedType.MULTI_CPU
        ):
            # Accelerate enables FSDP only on accelerators, although its FSDP2 also runs on gloo.
            state.distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise UserError("fsdp_version: 1 is not supported; use --fsdp_version 2")

    def gathered_weights(self) -> dict[str, Tensor] | None:
        """All weights of a sharded model, on the first process; None if it is not sharded."""
        return self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:  # noqa: ARG002
        """Parameter groups for each group in `GROUPS`, with and without decay; backbone first."""
        decayed = set(self.get_decay_parameter_names(self._whole))
        groups: list[dict[str, Any]] = []
        for group in GROUPS:
            for decay in (True, False):
                found = [
                    parameter
                    for name, parameter in trained(self._whole)
                    if group_of(name) == group and (name in decayed) is decay
                ]
                if found:
                    weight_decay = self.args.weight_decay if decay else 0.0
                    rate = self._rates[group]
                    groups.append({"params": found, "weight_decay": weight_decay, "lr": rate})
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self._whole)
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All matrices except those of routers and nulls, whose rows are independent vectors."""
        routers = (module for module in model.modules() if isinstance(module, DepthRouter))
        free = {id(parameter) for router in routers for parameter in router.parameters()}
        return [
            name
            for name, p in model.named_parameters()
            if p.ndim > 1 and id(p) not in free and group_of(name) != "null"
        ]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        minimized = super().training_step(*args, **kwargs)
        return minimized - self._share() * self._penalties[-1] if self._penalty else minimized

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self._penalty is None:
            return self._loss(*args, **kwargs)
        with self._penalty.collect() as penalties:
            loss = self._loss(*args, **kwargs)
        penalty = torch.stack(penalties).mean()
        self._penalties.append(penalty.detach())
        return loss + self._share() * penalty

    def _loss(self, model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
        """What a forward pass adds to the loss of the step, without the penalty."""
        ids_BT, steps = inputs["input_ids"], self.current_gradient_accumulation_steps
        weight = 0.0 if self._teacher is None else self._distill_weight
        loss: Any = 0.0
        if weight == 1:
            outputs = model(input_ids=ids_BT, use_cache=False)
        else:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            if not self.model_accepts_loss_kwargs:  # Gemma 3n: a mean over the forward pass
                loss = loss / steps
        if self._teacher is None:
            return loss
        with torch.no_grad(), self.accelerator.autocast():
            aim_BTV = self._teacher(input_ids=ids_BT, use_cache=False).logits
        return (1 - weight) * loss + weight / steps * divergence(aim_BTV, outputs.logits)

    def _share(self) -> float:
        """Weight of one forward pass's penalty in the step; the Trainer scales the loss itself."""
        return self._weight / self.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if self._penalties:
                mean = torch.stack(self._penalties).mean()
                logs["outlier_penalty"] = self.accelerator.gather(mean).mean().item()
                self._penalties.clear()
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, NullToLogit):
                    logs["null_factor"] = callback.factor
            config = self.accelerator.unwrap_model(self.model).config
            # A learned null logit only starts at that of the config; a softmax has none.
            if isinstance(config, OasisConfig) and config.normalizer.name == "softmax1":
                logs["null_logit"] = config.null_logit
        super().log(logs, start_time)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        norm = super()._get_grad_norm(model, grad_norm)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        # A loss that is not finite gives such a gradient; the weights are not updated yet.
        if not math.isfinite(norm):
            raise UserError(
                f"training: loss or gradient is not finite at step {self.state.global_step + 1};"
                " try a lower learning_rate; the existing checkpoints are valid"
            )
        return norm

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if self._adapted:
            load_model(self._whole, Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)
            return
        # The Trainer would not load weights with other names on disk (experts).
        found = type(self._whole).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        self._whole.load_state_dict(found.state_dict())

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if not self._adapted:
            super()._save(output_dir, state_dict)
        elif self.args.should_save and state_dict is None:  # FSDP2 resumes from its shards
            # Use the names in memory: in the family's format on disk, adapters of experts have no
            # name.
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self._whole, str(folder / SAFE_WEIGHTS_NAME))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.state.global_step == self.state.max_steps:
            return  # `train` saves the finished model
        staging = Path(str(self.args.output_dir))
        with writing(staging.parent):
            self._stage_and_publish(model, trial, staging)

    def _stage_and_publish(self, model: nn.Module, trial: Any, staging: Path) -> None:
        super()._save_checkpoint(model, trial)
        staged = staging / f"checkpoint-{self.state.global_step}"
        if self.is_fsdp_enabled:  # in addition to the shards, so that one process can load it
            self._save(str(staged), state_dict=self.gathered_weights())
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._tokenizer.save_pretrained(staged)
            publish(staged, staging.parent, self._run)
