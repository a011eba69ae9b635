"""Facts about a model for records: description, fingerprint, and checks before it is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.hub.prefix import prefix_of
from oasis_attn.modeling.configuration_oasis import BROKEN, OasisConfig
from oasis_attn.modeling.hf_compat import PROVENANCE_KEYS
from oasis_attn.records import ModelInfo


def describe_model(model: PreTrainedModel) -> ModelInfo:
    """The description of a model for records; `config` only for an OASIS model."""
    return ModelInfo(
        name=model.config.name_or_path or "",
        family=model.config.get_text_config(decoder=True).model_type,
        architecture=type(model).__name__,
        parameters=model.num_parameters(),
        dtype=str(model.dtype).removeprefix("torch."),
        config=model.config.settings if isinstance(model.config, OasisConfig) else None,
    )


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256, in hexadecimal, of the weights, modules and configuration of `model`.

    Models with the same fingerprint compute the same function, unless hooks or patched methods
    differ.  The name or path that the model was loaded from is not included.
    """
    config = model.config.to_dict()
    of_code = ("auto_map",) if isinstance(model.config, OasisConfig) else ()  # see `model_code`
    for name in (*PROVENANCE_KEYS, *of_code):
        config.pop(name, None)
    digest = hashlib.sha256(f"{model}\n{sorted(config.items())}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        for plain in plain_tensors(tensor):
            flat = plain.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor itself; for a subclass that wraps tensors (torchao's), the wrapped tensors."""
    if type(tensor) in (Tensor, nn.Parameter):
        yield tensor
    else:
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from plain_tensors(getattr(tensor, name))


def check_lengths(model: PreTrainedModel, lengths: Sequence[int], argument: str) -> None:
    """Raise `UserError` if the longest of `lengths`, in tokens, exceeds the model's positions.

    The tokens of a prefix take up positions too.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    prefix = prefix_of(model)
    used = 0 if prefix is None else len(prefix)
    if limit is not None and 0 < limit < max(lengths) + used:  # -1 means no limit
        note = f", {used} of which its prefix uses" if used else ""
        raise UserError(
            f"{argument}: {max(lengths)} tokens are more than the model's {limit} positions{note}"
        )


def check_savable(model: PreTrainedModel) -> None:
    """Raise `UserError` if transformers would refuse to save the model's configuration."""
    with TemporaryDirectory() as folder:
        try:
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
        except BROKEN as error:
            reason = " ".join(str(error).split())
            raise UserError(f"model: its configuration cannot be saved: {reason}") from error


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Context in which `model` is in eval mode; afterwards, each of its modules is as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])
        for module, training in modes:  # a frozen part of a model that is trained may be in eval
            module.training = training
