"""Checks of a plan whose trials are decoders on generated tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from oasis_attn.data.trigger import trigger_task
from oasis_attn.errors import UserError, check_choice
from oasis_attn.lab import LAB_SIZES, DecoderTraining, decoder_backbone
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.training.parameters import check_groups_trained, train_only

if TYPE_CHECKING:
    from oasis_attn.study.plan import Plan


def check_task_plan(plan: Plan) -> None:
    """Raise `UserError` on a task, size or field that its trials cannot run with."""
    if plan.evaluation:
        raise UserError("evaluation: a study of generated tasks has no problems to evaluate")
    for size in plan.sizes:
        check_choice("sizes", size, LAB_SIZES)
    for corpus, tasks in plan.corpora.items():
        trigger_task(corpus)
        if tasks:
            raise UserError(f"tasks of {corpus!r}: a generated task has none, not {list(tasks)}")


def check_decoder(size: str, settings: Mapping[str, Any], training: Mapping[str, Any]) -> None:
    """Raise `UserError` unless a decoder can have these settings and be trained so."""
    for name in training:
        check_choice("training", name, [field.name for field in fields(DecoderTraining)])
    given = DecoderTraining(**training)
    backbone = decoder_backbone(size, trigger_task("trigger"))
    config = OasisConfig(text_config=backbone, **settings)
    if given.trainable or given.learning_rates:
        with torch.device("meta"):
            model = OasisForCausalLM(config)
        train_only(model, given.trainable)
        check_groups_trained(model, given.learning_rates)
