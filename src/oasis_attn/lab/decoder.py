"""A decoder on a task of vectors: a linear map in, a decoder of any variant, a linear map out.

It is an `OasisForCausalLM` whose vocabulary has one entry per coordinate of a token.  The embedding
matrix is the map in, applied to the vector in place of a lookup, and the untied output head is the
map out.  So hooks, conversion, quantization, saving and loading work as for a language model.

Axes: B sequences, T tokens, N coordinates of a token, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, SmolLM3Config

from oasis_attn.data.tasks import Task
from oasis_attn.errors import UserError, check_choice, check_whole
from oasis_attn.lab.config import LAB_SIZES, DecoderTraining
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.training.parameters import check_groups_trained, group_of, train_only, trained

_WIDTH = 64
HEADS = 2
"""Attention heads of a layer, unless others are asked for."""
_BETAS, _MAX_NORM = (0.9, 0.95), 1.0
_LOGGED = 20  # rows in the table of training losses


class TrainedDecoder(NamedTuple):
    """A trained decoder.

    Attributes:
        model: the decoder, in eval mode.
        losses: rows of `step` and `loss`, the mean error since the row before.
        data_sha256: hash of all sequences that it was trained on.
    """

    model: OasisForCausalLM
    losses: list[dict[str, float]]
    data_sha256: str


def decoder_backbone(
    size: str, task: Task, *, rotary: bool = False, heads: int = HEADS
) -> SmolLM3Config:
    """The backbone of a decoder on `task`: pre-norm layers with a SwiGLU MLP.

    Raises:
        UserError: `size` is not one of `LAB_SIZES`, or `heads` does not divide the width.
    """
    check_choice("size", size, LAB_SIZES)
    check_whole("heads", heads, 1, _WIDTH)
    if _WIDTH % heads:
        raise UserError(f"heads: {heads} does not divide the width, {_WIDTH}")
    layers = LAB_SIZES[size]
    return SmolLM3Config(
        vocab_size=task.width,
        hidden_size=_WIDTH,
        intermediate_size=3 * _WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=task.length,
        no_rope_layers=[int(rotary)] * layers,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def embed(model: PreTrainedModel, x_BTN: Tensor) -> Tensor:
    """The input of the first layer for the tokens of a task, [B, T, D]."""
    embedding: Any = model.get_input_embeddings()
    embedded_BTD: Tensor = x_BTN @ embedding.weight
    return embedded_BTD


def predict(model: PreTrainedModel, x_BTN: Tensor) -> Tensor:
    """The output of a decoder for each token, [B, T, N]."""
    output: Tensor = model(inputs_embeds=embed(model, x_BTN), use_cache=False).logits
    return output


def new_decoder(
    size: str,
    settings: Mapping[str, Any],
    task: Task,
    *,
    seed: int,
    rotary: bool = False,
    heads: int = HEADS,
) -> OasisForCausalLM:
    """An untrained decoder.

    Args:
        size: one of `LAB_SIZES`.
        settings: settings of `OasisConfig`.
        task: sets the coordinates of a token, and the positions.
        seed: sets the initial weights.
        rotary: see `DecoderTraining`.
        heads: attention heads of a layer, a divisor of the width, 64.

    Raises:
        UserError: an unknown size, another number of heads, or settings that are not allowed.
    """
    backbone = decoder_backbone(size, task, rotary=rotary, heads=heads)
    torch.manual_seed(seed)
    return OasisForCausalLM(OasisConfig(text_config=backbone, **settings))


def train_decoder(
    size: str,
    settings: Mapping[str, Any],
    task: Task,
    training: DecoderTraining,
    *,
    seed: int,
) -> TrainedDecoder:
    """Train a new decoder to minimize the mean error over all targets (`TriggerBatch.errors`).

    Args:
        size: one of `LAB_SIZES`.
        settings: settings of `OasisConfig`.
        task: generates the sequences.
        training: steps, batch size, learning rate and what is trained.
        seed: sets the initial weights and the sequences; the sequences are equal for all settings.

    Raises:
        UserError: an unknown size, settings that are not allowed, a pattern of `trainable` that
            matches no parameter, or a group of `learning_rates` of which none is trained.
    """
    model = new_decoder(size, settings, task, seed=seed, rotary=training.rotary)
    return continue_training(model, task, training, seed=seed)


def continue_training(
    model: OasisForCausalLM, task: Task, training: DecoderTraining, *, seed: int
) -> TrainedDecoder:
    """As `train_decoder`, from the weights of `model`, which is changed in place."""
    train_only(model.train(), training.trainable)
    check_groups_trained(model, training.learning_rates)
    data = torch.Generator().manual_seed(seed)
    parameters = [parameter for _, parameter in trained(model)]
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trained(model):
        groups.setdefault(group_of(name), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": group,
                "lr": training.learning_rates.get(name, training.learning_rate),
                "weight_decay": training.weight_decay if name == "backbone" else 0.0,
            }
            for name, group in groups.items()
        ],
        betas=_BETAS,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.rate)
    digest, every = hashlib.sha256(), max(1, training.steps // _LOGGED)
    losses: list[dict[str, float]] = []
    recent: list[float] = []
    for step in range(1, training.steps + 1):
        batch = task.batch(training.batch_size, data)
        digest.update(batch.x_BTN.numpy().tobytes())
        loss = batch.mean_error(predict(model, batch.x_BTN))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
        optimizer.step()
        schedule.step()
        recent.append(float(loss.detach()))
        if step % every == 0 or step == training.steps:
            losses.append({"step": step, "loss": sum(recent) / len(recent)})
            recent.clear()
    return TrainedDecoder(model.eval(), losses, digest.hexdigest())
