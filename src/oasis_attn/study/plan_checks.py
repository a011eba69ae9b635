"""Checks that the trials of a plan can run.

Only `check_model` imports torch and transformers: names are checked before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oasis_attn.data import load_corpus
from oasis_attn.data.tasks import TASKS, task_by_name
from oasis_attn.errors import UserError, check_choice, nearest
from oasis_attn.evaluation import EvaluationConfig
from oasis_attn.hub.model_sizes import check_size, text_config
from oasis_attn.lab import LAB_SIZES, DecoderTraining
from oasis_attn.modeling.settings import check_settings
from oasis_attn.modeling.variants import settings_of, variants
from oasis_attn.quantization.schemes import schemes
from oasis_attn.training import TrainingConfig

if TYPE_CHECKING:
    from oasis_attn.study.plan import Plan, Trial

_SET_BY_TRIAL = {
    *("out", "from_model", "variant", "settings", "corpus", "size", "seed", "resume"),
    "report_to",
}
_TRAINING = tuple(f.name for f in fields(TrainingConfig) if f.name not in _SET_BY_TRIAL)
# What one variant may change: the data of a training run stay equal for all variants.
_TRAINING_OF_VARIANT = ("learning_rate", "learning_rates", "outlier_penalty", "trainable")
_EVALUATION = ("limit", "shots", "max_new_tokens", "batch_size")


def check_names(plan: Plan) -> None:
    """Raise `UserError` on a scheme, corpus, task, size or field that trials cannot run with."""
    for scheme in plan.schemes:
        check_choice("schemes", scheme, schemes())
    if plan.on_task:
        _check_generated(plan)
    else:
        _check_text(plan)


def _check_generated(plan: Plan) -> None:
    if plan.evaluation:
        raise UserError("evaluation: a study of generated tasks has no problems to evaluate")
    for size in plan.sizes:
        check_choice("sizes", size, LAB_SIZES)
    for corpus, tasks in plan.corpora.items():
        task_by_name(corpus)
        if tasks:
            raise UserError(f"tasks of {corpus!r}: a generated task has none, not {list(tasks)}")
    decoder_training(plan.training)


def decoder_training(training: Mapping[str, Any]) -> DecoderTraining:
    """The training of a decoder; `UserError` on a field or value that is not allowed."""
    for name in training:
        check_choice("training", name, [field.name for field in fields(DecoderTraining)])
    return DecoderTraining(**training)


def _check_text(plan: Plan) -> None:
    for corpus in plan.corpora:  # first: a misspelt task has fields that language models have not
        try:
            for split in ("train", plan.eval_split):
                load_corpus(corpus, split, arguments=("corpora", "eval_split"))
        except UserError as error:
            near = nearest(corpus, TASKS)
            hint = f"; did you mean the task {near[0]}-LENGTH?" if near else ""
            raise UserError(f"{error}{hint}") from error
    for name in plan.training:
        check_choice("training", name, _TRAINING)
    for name in plan.evaluation:
        check_choice("evaluation", name, _EVALUATION)
    EvaluationConfig(tasks=("arith",), **plan.evaluation)
    for corpus, tasks in plan.corpora.items():
        if "perplexity" in tasks:
            raise UserError(
                f"tasks of {corpus!r}: every trial measures perplexity; remove 'perplexity'"
            )
        if tasks:
            EvaluationConfig(tasks=tasks, corpus=corpus, **plan.evaluation)
    for size in plan.sizes:
        check_size(size)


def check_variant(plan: Plan, name: str) -> dict[str, Any]:
    """The settings of a variant; `UserError` on an unknown name, setting or value."""
    given = plan.variants[name]
    base, overrides = given["base"], given["overrides"]
    for field_name in given.get("training", ()):
        check_choice(f"training of {name!r}", field_name, _TRAINING_OF_VARIANT)
    if name in variants() and (base != name or overrides or "training" in given):
        raise UserError(
            f"variants: {name!r} is a variant of `oasis variants`; a changed one requires"
            " another name"
        )
    settings = settings_of(base) | dict(overrides)
    check_settings(settings)
    if plan.on_task:
        decoder_training(plan.training_of(name))
    return settings


def check_model(trial: Trial, sizes: tuple[str, ...], settings: Mapping[str, Any]) -> None:
    """Raise `UserError` unless models of these sizes can have these settings and be trained so."""
    from oasis_attn.modeling.configuration_oasis import OasisConfig

    if not trial.on_task:
        for size in sizes:
            OasisConfig(text_config=text_config(size), **settings)
        trial.training_config(Path(trial.variant))
        return

    import torch

    from oasis_attn.lab import decoder_backbone
    from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
    from oasis_attn.training.parameters import check_groups_trained, train_only

    config = OasisConfig(
        text_config=decoder_backbone(trial.size, task_by_name("trigger")), **settings
    )
    training = decoder_training(trial.training)
    if training.trainable or training.learning_rates:
        with torch.device("meta"):
            model = OasisForCausalLM(config)
        train_only(model, training.trainable)
        check_groups_trained(model, training.learning_rates)
