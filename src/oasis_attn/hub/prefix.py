"""A prefix: stored keys and values of a few tokens before every sequence that a model reads.

Every sequence attends to them as if it started with these tokens, but the model does not compute
the tokens again.  The massive activations of a sink occurred when the prefix was computed, and do
not occur at inference time (CushionCache 2406.12016, PrefixQuant 2410.05265).

The prefix is invisible to callers: masks, positions and logits refer to their own tokens.
`save_pretrained` stores it with the weights (see `prefix_storage`), and `from_pretrained` restores
it.  The subfolder `prefix` has a copy as a PEFT adapter of type `PREFIX_TUNING`, for the model
without prefix.

Axes: L layers, G key heads, P prefix tokens, d head width; B batch, T tokens.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from oasis_attn.errors import UserError, one_line
from oasis_attn.hub.peft_adapter import CONFIG, TENSOR, WEIGHTS, Adapter
from oasis_attn.hub.prefix_storage import forget_prefix, prefix_hf_quantizer
from oasis_attn.modeling import packing
from oasis_attn.modeling.decoder_map import find_decoder
from oasis_attn.modeling.hf_compat import find_file
from oasis_attn.modeling.pretrained import SAVE_HOOKS

FOLDER = "prefix"
_BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """The keys and values of the prefix tokens.

    Attributes:
        tokens: the P token ids.
        keys_LGPd, values_LGPd: keys (after the rotary embedding) and values, as in a cache.
        tuned: whether they were trained, and are no longer those of the tokens.
    """

    tokens: tuple[int, ...]
    keys_LGPd: Tensor
    values_LGPd: Tensor
    tuned: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def describe(self) -> dict[str, Any]:
        """The tokens, the shape of the keys and of the values, and `tuned`, as JSON values."""
        shape = list(self.keys_LGPd.shape)
        return {"tokens": list(self.tokens), "shape": shape, "tuned": self.tuned}

    @property
    def adapter(self) -> Adapter:
        """The prefix in the form that peft reads."""
        metadata = {"tokens": json.dumps(self.tokens), "tuned": json.dumps(self.tuned)}
        return Adapter(self.keys_LGPd, self.values_LGPd, metadata)

    @classmethod
    def load(cls, config: str, weights: str) -> Prefix:
        """Read the two files of `adapter`; `UserError` if they are broken or inconsistent."""
        try:
            about = json.loads(Path(config).read_text(encoding="utf-8"))
            heads, layers = about["num_attention_heads"], about["num_layers"]
            with safe_open(weights, "pt") as file:
                stored = file.metadata()
                tokens, tuned = tuple(json.loads(stored["tokens"])), json.loads(stored["tuned"])
                flat = file.get_tensor(TENSOR)
            packed_PLKGd = flat.view(len(tokens), layers, 2, heads, about["token_dim"] // heads)
        except (OSError, RuntimeError, SafetensorError, *_BROKEN) as error:
            raise UserError(
                f"prefix: {str(weights)!r} is not a prefix of oasis-attn ({one_line(error)})"
            ) from error
        if not flat.isfinite().all():
            raise UserError(f"prefix: {str(weights)!r} holds NaN or infinity")
        keys, values = packed_PLKGd.permute(2, 1, 3, 0, 4).contiguous()
        return cls(tokens=tokens, keys_LGPd=keys, values_LGPd=values, tuned=tuned is True)


def load_prefix(source: str | os.PathLike[str]) -> Prefix | None:
    """Load the adapter in the subfolder `prefix` of `source` (folder or Hub id), or None."""
    config, weights = (
        find_file(source, name, subfolder=FOLDER, absent_ok=True, offline_ok=True)
        for name in (CONFIG, WEIGHTS)
    )
    if config is None and weights is None:
        return None
    if config is None or weights is None:
        raise UserError(f"prefix: {str(source)!r} holds only one of {CONFIG} and {WEIGHTS}")
    return Prefix.load(config, weights)


def copy_prefix(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Write the prefix of `model` to `folder`/prefix as an adapter.

    If the model has no prefix, an adapter that is already there is removed.
    """
    prefix = prefix_of(model)
    if prefix is not None:
        prefix.adapter.save(Path(folder) / FOLDER)
        return
    for name in (CONFIG, WEIGHTS):
        Path(folder, FOLDER, name).unlink(missing_ok=True)


@torch.no_grad()
def compute_prefix(model: PreTrainedModel, tokens: Sequence[int]) -> Prefix:
    """Compute the keys and values of `tokens` at the start of a sequence.

    Raises:
        UserError: there are no tokens, or some are outside the vocabulary; the model already has a
            prefix, or the keys and values do not have the same shape `[G, P, d]` in every layer.
    """
    _check_no_prefix(model)
    size = model.config.get_text_config(decoder=True).vocab_size
    if not tokens or not all(0 <= token < size for token in tokens):
        raise UserError(
            f"tokens: {list(tokens)} is not a list of one or more ids in 0 .. {size - 1}"
        )
    decoder: Any = find_decoder(model).module
    modes = [(module, module.training) for module in model.modules()]
    cache = DynamicCache(config=decoder.config.get_text_config(decoder=True))
    ids_1P = torch.tensor([list(tokens)], device=model.device)
    model.eval()
    try:
        decoder(input_ids=ids_1P, past_key_values=cache, use_cache=True)
    finally:
        for module, training in modes:
            module.training = training
    pairs = [(getattr(at, "keys", None), getattr(at, "values", None)) for at in cache.layers]
    shapes = {None if x is None else tuple(x.shape) for x in chain.from_iterable(pairs)}
    shape = (shapes.pop() if len(shapes) == 1 else None) or ()
    if len(shape) != 4 or shape[2] != len(tokens):
        raise UserError(
            f"model: family {model.config.model_type!r} cannot have a prefix, because its layers do"
            f" not all cache keys and values of the same shape for all {len(tokens)} tokens"
        )
    keys, values = (torch.cat(part) for part in zip(*pairs, strict=True))
    return Prefix(tokens=tuple(tokens), keys_LGPd=keys, values_LGPd=values)


@torch.no_grad()
def check_can_have_prefix(model: PreTrainedModel) -> None:
    """Raise `UserError` unless `model` runs with a prefix of one token."""
    prefixed: Any = with_prefix(model, compute_prefix(model, [0])).eval()
    try:
        prefixed.base_model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device))
    except UserError as error:
        family = model.config.model_type
        raise UserError(f"model: family {family!r} cannot have a prefix: {error}") from error


def with_prefix(model: PreTrainedModel, prefix: Prefix) -> PreTrainedModel:
    """Return a copy of `model` with `prefix`; see `attach_prefix`.

    The copy shares all tensors with `model`, so that training one changes the other.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return attach_prefix(copy.deepcopy(model, shared), prefix)


def without_prefix(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of `model`, which has a prefix, without it; all tensors are shared."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    result = copy.deepcopy(model, shared)
    decoder: Any = find_decoder(result).module
    for handle in decoder.kv_prefix.hooks:
        handle.remove()
    del decoder.kv_prefix
    forget_prefix(result)
    return result


def attach_prefix(model: PreTrainedModel, prefix: Prefix) -> PreTrainedModel:
    """Attach `prefix` to `model` in place, so that every sequence attends to it; returns `model`.

    Forward passes of the model and of its base model, and `generate` with growing caches, give the
    logits that the model computes if the prefix tokens precede the input.  Left padding and labels
    work as without a prefix.  For the caller, `get_seq_length` of a cache does not count the
    prefix, so that generation can continue from a returned cache.  In layers with a sliding window,
    the prefix leaves the window as tokens do.  `save_pretrained` saves the prefix.

    Raises:
        UserError: the prefix belongs to another model, or the model already has a prefix or was
            quantized by another library.  In forward passes: a cache of fixed size, of another
            batch size or filled without the prefix, a mask that is not [B, tokens so far], packed
            sequences, and activation checkpointing, which does not support caches.
    """
    _check_no_prefix(model)
    text = model.config.get_text_config(decoder=True)
    heads = {getattr(text, "num_key_value_heads", None), text.num_attention_heads}
    L, G, P, _ = prefix.keys_LGPd.shape
    if text.num_hidden_layers < L or G not in heads:
        raise UserError(
            f"prefix: it has {L} layers of {G} key heads, but the model has"
            f" {text.num_hidden_layers} layers or other heads; it belongs to another model"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and positions <= P:
        raise UserError(f"prefix: it has {P} tokens, but the model has only {positions} positions")
    prefix_hf_quantizer(model).quantization_config.prefix = prefix.describe()
    decoder: Any = find_decoder(model).module
    store = _Store(prefix, model)
    decoder.add_module("kv_prefix", store)
    store.hooks = (
        decoder.register_forward_pre_hook(_prepend_prefix, with_kwargs=True),
        decoder.register_forward_hook(_restore_cache, with_kwargs=True),
    )
    return model


def prefix_of(model: PreTrainedModel) -> Prefix | None:
    """The prefix of `model`; None if there is none."""
    store: Any = _find_store(model)
    if store is not None:
        keys, values = store.keys, store.values
        return Prefix(tokens=store.tokens, keys_LGPd=keys, values_LGPd=values, tuned=store.tuned)
    return None


@contextmanager
def prefix_replaced(
    model: PreTrainedModel, keys_LGPd: Tensor, values_LGPd: Tensor
) -> Iterator[None]:
    """Inside the context, `model` uses these keys and values, which may require gradients."""
    store: Any = _find_store(model)
    before, store.keys, store.values = (store.keys, store.values), keys_LGPd, values_LGPd
    try:
        yield
    finally:
        store.keys, store.values = before


def _find_store(model: PreTrainedModel) -> _Store | None:
    return next((module for module in model.modules() if isinstance(module, _Store)), None)


class _Store(nn.Module):
    """The prefix as a module: it moves to the model's device and dtype, but is not in its state."""

    hooks: tuple[RemovableHandle, ...] = ()
    """The hooks of the decoder that use the prefix."""

    def __init__(self, prefix: Prefix, model: PreTrainedModel) -> None:
        super().__init__()
        self.tokens, self.tuned = prefix.tokens, prefix.tuned
        self.window = packing.smallest_window(model.config)
        for name, x in (("keys", prefix.keys_LGPd), ("values", prefix.values_LGPd)):
            self.register_buffer(name, x.to(model.device, model.dtype), persistent=False)

    def extra_repr(self) -> str:  # a hash, because `state_dict()` does not contain the prefix
        numbers = torch.stack([*self.buffers()]).float().cpu().numpy()
        return f"tokens={self.tokens}, sha256={hashlib.sha256(numbers.tobytes()).hexdigest()}"

    def fill(self, cache: Cache, batch: int) -> None:
        for layer, pair in enumerate(zip(self.keys, self.values, strict=True)):  # type: ignore[arg-type]
            cache.update(*(x_GPd.expand(batch, -1, -1, -1) for x_GPd in pair), layer)
        cache.kv_prefix = self.tokens  # type: ignore[attr-defined]
        cache.get_seq_length = MethodType(_length, cache)  # type: ignore[method-assign]
        cache.get_query_offset = MethodType(_query_offset, cache)  # type: ignore[method-assign]


# Methods of a cache with a prefix.  They are bound to it, so that a copied cache uses its own.


def _length(cache: Any, layer_idx: int = 0) -> int:
    """The number of tokens in the cache; outside the decoder, prefix tokens do not count."""
    length: int = type(cache).get_seq_length(cache, layer_idx)
    return length if cache.in_decoder or not length else length - len(cache.kv_prefix)


def _query_offset(cache: Any, layer_idx: int = 0) -> int:
    """The method of transformers, which calls it inside a decoder only."""
    if not cache.in_decoder:
        raise UserError(
            "past_key_values: it was filled by a model with a prefix, but this model has none"
        )
    return _length(cache, layer_idx)


# Module-level functions that find the prefix on the module, so that a copied model uses its own.


def _prepend_prefix(
    module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the arguments of the decoder so that the prefix precedes the input."""
    store: Any = module.kv_prefix
    if len(args) > 1:
        raise UserError(
            "arguments: in a model with a prefix, all except input_ids must be given by name"
        )
    if module.training and getattr(module, "is_activation_checkpointing", False):
        raise UserError("activation_checkpointing: it does not work with a prefix; disable it")
    batch, fresh = packing.input_of(args, kwargs).shape[:2]
    cache: Any = kwargs.get("past_key_values")
    if cache is None:
        cache = DynamicCache(config=module.config.get_text_config(decoder=True))
    elif not isinstance(cache, Cache) or getattr(cache, "is_compileable", False):
        kind = "has a fixed size" if isinstance(cache, Cache) else "belongs to generate_batch"
        raise UserError(f"past_key_values: {type(cache).__name__} {kind} and cannot hold a prefix")
    length, held = len(store.tokens), type(cache).get_seq_length(cache)
    if held == 0:
        store.fill(cache, batch)
        held = length
    elif getattr(cache, "kv_prefix", None) != store.tokens:
        raise UserError("past_key_values: it was filled without this model's prefix")
    past, filled = held - length, len(cache.layers[0].keys)
    if past < 0:
        raise UserError(f"past_key_values: {-past} tokens of the prefix were removed from it")
    if filled != batch:
        raise UserError(f"past_key_values: it has {filled} sequences, but the input has {batch}")
    own = past + fresh
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    kwargs = kwargs | {"past_key_values": cache}
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != (batch, own):
            found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise UserError(
                f"attention_mask: {found} is not [{batch}, {own}] (without prefix), and finished"
                " masks cannot be extended by a prefix"
            )
        kwargs["attention_mask"] = torch.cat([mask.new_ones(batch, length), mask], 1)
        if not mask[:, 0].all():  # the padding is between the prefix and the first token
            if store.window is not None and length + own > store.window:
                raise UserError(
                    "attention_mask: padding on the left moves the prefix out of the sliding window"
                    f" of {store.window} tokens; pass rows of one length, or one row at a time"
                )
            if positions is None and packing.takes_positions(type(module)):
                positions = packing.padded_positions(mask, past, fresh)
    if positions is not None:
        counted = torch.arange(past, own, device=positions.device)
        if mask is None and not bool((positions == counted).all()):
            raise UserError(
                f"position_ids: without a mask they must be {past} .. {own - 1} (without prefix);"
                " packed sequences cannot have a prefix"
            )
        if mask is not None and fresh > 1 and not packing.is_one_sequence(positions, mask):
            raise UserError("position_ids: they restart, but packed sequences cannot have a prefix")
        kwargs["position_ids"] = positions + length
    cache.in_decoder = True
    return args, kwargs


def _restore_cache(
    module: PreTrainedModel, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Hide the prefix from the caller again; return no cache if the caller asked for none."""
    kwargs["past_key_values"].in_decoder = False
    wanted = kwargs.get("use_cache")
    if wanted is None:
        wanted = module.config.use_cache
    if not wanted and isinstance(output, ModelOutput):
        output["past_key_values"] = None
    return output


def _check_no_prefix(model: PreTrainedModel) -> None:
    if prefix_of(model) is not None:
        raise UserError("model: it already has a prefix; use the model without it")


SAVE_HOOKS.append(copy_prefix)
