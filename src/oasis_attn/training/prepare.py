"""Prepare a training run, and check its inputs before anything is written to its folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from oasis_attn.data import (
    Corpus,
    TokenBlocks,
    Windows,
    corpus_tokenizer,
    fixed_vocab_size,
    load_corpus,
    read_windows,
    token_blocks,
    tokenizer_sha256,
)
from oasis_attn.errors import UserError
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.model_info import check_lengths, check_savable, plain_tensors
from oasis_attn.hub.model_sizes import text_config
from oasis_attn.hub.prefix import prefix_of
from oasis_attn.hub.tokenizer_prefix import check_no_prefix_in_tokenizer
from oasis_attn.modeling.hf_compat import parse_flag_from_env
from oasis_attn.modeling.null_logit import least_of_context, of_windows, resolve_null_logit
from oasis_attn.modeling.variants import settings_of
from oasis_attn.ops.normalizers import with_length
from oasis_attn.training.anneal import LOWEST_START, NullAnneal
from oasis_attn.training.config import TrainingConfig
from oasis_attn.training.lora import adapt
from oasis_attn.training.model import build_model
from oasis_attn.training.null_to_logit import NullToLogit, finish
from oasis_attn.training.parameters import check_groups_trained, train_only, trained

if TYPE_CHECKING:
    from peft import LoraModel


_MEASURED_BLOCKS = 8  # for the means that `NullToLogit` needs


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The inputs of a training run.

    Attributes:
        label: a short name of the run, for the progress bar.
        trained_parameters: number of parameters that are trained.
        model: the initial model.
        adapter: the LoRA wrapper of `model`; None without LoRA.
        tokenizer: the tokenizer of the model.
        teacher: the model to distill from; None without one.
        callbacks: Trainer callbacks that change the model between steps.
        corpus: the training split.
        held_out: the split for the final loss.
        blocks: token blocks of `corpus`.
        windows: token blocks of `held_out`.
        identity: the config, the number of processes, and the hashes of corpus, tokenizer and
            initial weights, which must be equal for a resumed run.
    """

    label: str
    trained_parameters: int
    model: PreTrainedModel
    adapter: LoraModel | None
    tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel | None
    callbacks: list[TrainerCallback]
    corpus: Corpus
    blocks: TokenBlocks
    windows: Windows
    identity: dict[str, Any]


def prepare(config: TrainingConfig, processes: int = 1) -> Prepared:
    """Load the corpus, and create or load the tokenizer and the model.

    Raises:
        UserError: they cannot be loaded, or do not fit together.
    """
    corpus = load_corpus(config.corpus)
    held_out = load_corpus(config.corpus, config.eval_split, arguments=("corpus", "eval_split"))
    task = corpus.task
    if task is not None and config.block_length != task.window:
        raise UserError(
            f"block_length: {config.block_length} is not {task.window}, the number of tokens of"
            f" each document of {config.corpus!r}"
        )
    model, tokenizer = _start(config, corpus)
    if getattr(model, "is_quantized", False):
        raise UserError(
            f"from_model: {str(config.from_model)!r} is quantized; train the original model"
        )
    check_savable(model)
    check_lengths(model, [config.block_length], "block_length")
    teacher = _teacher(config, model, tokenizer)
    identity = config.to_dict() | {
        "processes": processes,
        "corpus_sha256": corpus.sha256,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "weights_sha256": _sha256(model) if config.from_model else None,
        "teacher_sha256": _sha256(teacher) if teacher is not None else None,
    }
    if tokenizer.eos_token_id is None:
        raise UserError("tokenizer: it has no end-of-text token, which separates documents")
    vocab_size = _vocab_size(model)
    blocks = token_blocks(corpus, tokenizer, config.block_length, vocab_size=vocab_size)
    callbacks: list[TrainerCallback] = []
    if config.anneal_null:
        callbacks.append(_null_anneal(config, model))
    shrinking = _null_to_logit(config, model, blocks) if config.null_to_logit else None
    adapter = _adapted(config, model)
    if shrinking is not None:
        shrinking.freeze()
        callbacks.append(shrinking)
    if not any(trained(model)):
        raise UserError(
            f"trainable: {list(config.trainable or ())} are keys and values of nulls, which"
            " null_to_logit shrinks and does not train"
        )
    check_groups_trained(model, config.learning_rates)

    windows = read_windows(
        held_out,
        tokenizer,
        window=config.block_length,
        windows=config.eval_windows,
        vocab_size=vocab_size,
    )
    sequences = config.batch_size * config.gradient_accumulation * processes
    if len(blocks) < sequences:
        raise UserError(
            f"batch_size: a step needs {sequences} sequences, but {config.corpus!r} has only"
            f" {len(blocks)} of {config.block_length} tokens"
        )
    return Prepared(
        label=Path(config.from_model).name if config.from_model else config.new_model[0],
        trained_parameters=sum(p.numel() for _, p in trained(model)),
        model=model,
        adapter=adapter,
        tokenizer=tokenizer,
        teacher=teacher,
        callbacks=callbacks,
        corpus=corpus,
        blocks=blocks,
        windows=windows,
        identity=identity,
    )


def whole_model(
    config: TrainingConfig, prepared: Prepared, weights: dict[str, torch.Tensor] | None
) -> PreTrainedModel:
    """The trained model with merged adapters; if it was sharded, rebuilt from gathered weights."""
    model, adapter = prepared.model, prepared.adapter
    if weights is not None:
        model, _ = _start(config, prepared.corpus)
        adapter = _adapted(config, model)
        model.load_state_dict(weights)
        if config.anneal_null:
            model.config.null_logit = prepared.model.config.null_logit
    if adapter is not None:
        adapter.merge_and_unload()
    if config.null_to_logit:
        finish(model)
    return model


def _start(
    config: TrainingConfig, corpus: Corpus
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if config.from_model is not None:
        model, tokenizer = load_model(config.from_model, trust_remote_code=config.trust_remote_code)
        check_no_prefix_in_tokenizer(tokenizer, config.from_model)
        return model, tokenizer
    variant, size = config.new_model
    backbone = text_config(size, config.vocab_size or fixed_vocab_size(corpus))
    tokenizer = corpus_tokenizer(corpus, backbone.vocab_size)
    backbone.bos_token_id, backbone.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    # The tokenizer pads with BOS.  If the config had this pad token, the embedding row of BOS would
    # neither be initialized nor trained.
    backbone.pad_token_id = None
    settings = settings_of(variant) | dict(config.settings)
    if "token_normalizer" in settings:
        settings["token_normalizer"] = with_length(
            settings["token_normalizer"], config.block_length
        )
    if "null_logit" in settings:
        settings["null_logit"] = of_windows(settings["null_logit"], config.block_length)
    return build_model(backbone, settings, config.seed), tokenizer


def _null_anneal(config: TrainingConfig, model: PreTrainedModel) -> NullAnneal:
    steps = config.anneal_null
    if config.from_model is None:
        return NullAnneal(model.config, steps, target=model.config.null_logit)
    text, final = model.config.get_text_config(decoder=True), config.settings.get("null_logit", 0.0)
    least = least_of_context(getattr(model.config, "residual", "sum"), "softmax1")
    return NullAnneal(
        model.config,
        steps,
        target=resolve_null_logit(of_windows(final, config.block_length), text, least),
        start=getattr(model.config, "null_logit", LOWEST_START),
    )


def _null_to_logit(
    config: TrainingConfig, model: PreTrainedModel, blocks: TokenBlocks
) -> NullToLogit:
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise UserError("null_to_logit: FSDP is not supported; use DDP or one process")
    count = min(_MEASURED_BLOCKS, len(blocks))
    batches = [blocks[index * len(blocks) // count][None] for index in range(count)]
    return NullToLogit(model, config.null_to_logit, batches)


def _teacher(
    config: TrainingConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | None:
    """The model of `distill_from`; `UserError` if its tokens are not those of `model`."""
    if config.distill_from is None:
        return None
    teacher, own = load_model(config.distill_from, trust_remote_code=config.trust_remote_code)
    same = tokenizer_sha256(own) == tokenizer_sha256(tokenizer)
    if not same or _vocab_size(teacher) != _vocab_size(model):
        raise UserError(
            f"distill_from: {str(config.distill_from)!r} has another tokenizer or vocabulary size"
            " than the model to train"
        )
    check_lengths(teacher, [config.block_length], "block_length with distill_from")
    return teacher.requires_grad_(False)


def _vocab_size(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config(decoder=True).vocab_size
    return size


def _adapted(config: TrainingConfig, model: PreTrainedModel) -> LoraModel | None:
    adapter = adapt(model, config.lora_rank, config.seed) if config.lora_rank else None
    train_only(model, config.trainable or ())
    return adapter


def _sha256(model: PreTrainedModel) -> str:
    digest, prefix = hashlib.sha256(), prefix_of(model)
    kept = model.state_dict()
    if prefix is not None:
        kept |= {"prefix.keys": prefix.keys_LGPd, "prefix.values": prefix.values_LGPd}
    for name, weight in sorted(kept.items()):
        digest.update(name.encode())
        for plain in plain_tensors(weight):
            digest.update(plain.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
