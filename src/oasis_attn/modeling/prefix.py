"""A prefix: the keys and values of a few tokens, in front of whatever a model reads.

Every sequence attends to them as if the tokens stood before it, and they are computed no more: what
is massive about a sink happened once, inside (CushionCache 2406.12016, PrefixQuant 2410.05265).

Callers do not see it: masks, positions and logits are of their own tokens.  `save_pretrained`
stores it with the weights (see `hf_quantizer`), and `from_pretrained` puts it back.  A copy in the
subfolder `prefix` is a PEFT adapter of type `CARTRIDGE`, for the model without it.

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
from safetensors.torch import save
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput, cached_file

from oasis_attn.errors import UserError, one_line
from oasis_attn.files import write_bytes, write_text
from oasis_attn.modeling.hf_quantizer import prefix_quantizer
from oasis_attn.modeling.packing import input_of, is_one_sequence

FOLDER = "prefix"
_BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
_CONFIG, _WEIGHTS, _TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """What every sequence finds before it.

    Attributes:
        tokens: the P token ids that it was made from.
        keys_LGPd, values_LGPd: rotated keys, and values, as a cache holds them.
    """

    tokens: tuple[int, ...]
    keys_LGPd: Tensor
    values_LGPd: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def describe(self) -> dict[str, Any]:
        """Its tokens, and the shape of its keys and of its values, as JSON has them."""
        return {"tokens": list(self.tokens), "shape": list(self.keys_LGPd.shape)}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a PEFT adapter: its config, and `[P, L * 2 * G * d]` numbers."""
        L, G, P, d = self.keys_LGPd.shape
        packed_LKGPd = torch.stack([self.keys_LGPd, self.values_LGPd], 1)
        flat = packed_LKGPd.permute(3, 0, 1, 2, 4).reshape(P, -1).detach().cpu().contiguous()
        config = {
            "peft_type": "CARTRIDGE",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "num_virtual_tokens": P,
            "num_frozen_tokens": 0,
            "num_layers": L,
            "num_attention_heads": G,
            "token_dim": G * d,
            "num_transformer_submodules": 1,
        }
        metadata = {"format": "pt", "tokens": json.dumps(self.tokens)}
        write_bytes(Path(folder) / _WEIGHTS, save({_TENSOR: flat}, metadata))
        write_text(Path(folder) / _CONFIG, json.dumps(config, indent=1) + "\n")

    @classmethod
    def load(cls, config: str, weights: str) -> Prefix:
        """Read the two files of `save`; `UserError` if they are broken or do not fit together."""
        try:
            about = json.loads(Path(config).read_text(encoding="utf-8"))
            heads, layers = about["num_attention_heads"], about["num_layers"]
            with safe_open(weights, "pt") as file:
                tokens = tuple(json.loads(file.metadata()["tokens"]))
                flat = file.get_tensor(_TENSOR)
            packed_PLKGd = flat.view(len(tokens), layers, 2, heads, about["token_dim"] // heads)
        except (OSError, RuntimeError, SafetensorError, *_BROKEN) as error:
            raise UserError(
                f"prefix: {str(weights)!r} is not a prefix of ours ({one_line(error)})"
            ) from error
        if not flat.isfinite().all():
            raise UserError(f"prefix: {str(weights)!r} has numbers that are not finite")
        keys, values = packed_PLKGd.permute(2, 1, 3, 0, 4).contiguous()
        return cls(tokens=tokens, keys_LGPd=keys, values_LGPd=values)


def load_prefix(source: str | os.PathLike[str]) -> Prefix | None:
    """The adapter in the subfolder `prefix` of `source` (a folder or hub id); None without one."""
    config, weights = (
        cached_file(
            source,
            name,
            subfolder=FOLDER,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for name in (_CONFIG, _WEIGHTS)
    )
    if config is None and weights is None:
        return None
    if config is None or weights is None:
        raise UserError(f"prefix: {str(source)!r} holds only one of {_CONFIG} and {_WEIGHTS}")
    return Prefix.load(config, weights)


def copy_prefix(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Write the prefix of `model` to `folder`/prefix as an adapter; remove one that it lacks."""
    prefix = prefix_of(model)
    if prefix is not None:
        prefix.save(Path(folder) / FOLDER)
        return
    for name in (_CONFIG, _WEIGHTS):
        Path(folder, FOLDER, name).unlink(missing_ok=True)


@torch.no_grad()
def compute_prefix(model: PreTrainedModel, tokens: Sequence[int]) -> Prefix:
    """The keys and values of `tokens` as `model` computes them at the start of a sequence.

    Raises:
        UserError: no tokens, or some outside the vocabulary; a model that has a prefix already, or
            one that does not keep the same keys and values `[G, P, d]` in every layer.
    """
    _check_none(model)
    size = model.config.get_text_config(decoder=True).vocab_size
    if not tokens or not all(0 <= token < size for token in tokens):
        raise UserError(f"tokens: {list(tokens)} is not one or more ids in 0 .. {size - 1}")
    decoder: Any = model.get_decoder()
    training = model.training
    cache = DynamicCache(config=decoder.config.get_text_config(decoder=True))
    ids_1P = torch.tensor([list(tokens)], device=model.device)
    model.eval()
    try:
        decoder(input_ids=ids_1P, past_key_values=cache, use_cache=True)
    finally:
        model.train(training)
    pairs = [(getattr(at, "keys", None), getattr(at, "values", None)) for at in cache.layers]
    shapes = {None if x is None else tuple(x.shape) for x in chain.from_iterable(pairs)}
    shape = (shapes.pop() if len(shapes) == 1 else None) or ()
    if len(shape) != 4 or shape[2] != len(tokens):
        raise UserError(
            f"model: family {model.config.model_type!r} does not keep keys and values of one shape"
            f" for all {len(tokens)} tokens in every layer; it can have no such prefix"
        )
    keys, values = (torch.cat(part) for part in zip(*pairs, strict=True))
    return Prefix(tokens=tuple(tokens), keys_LGPd=keys, values_LGPd=values)


def with_prefix(model: PreTrainedModel, prefix: Prefix) -> PreTrainedModel:
    """A copy of `model` that reads everything behind `prefix`; see `attach_prefix`.

    It shares all tensors with `model`: train one, and the other changes.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return attach_prefix(copy.deepcopy(model, shared), prefix)


def attach_prefix(model: PreTrainedModel, prefix: Prefix) -> PreTrainedModel:
    """Let `model` read everything behind `prefix` from now on, and save it along; returns `model`.

    Logits are those of the tokens standing before the input, in forward passes of the model, its
    base and in `generate` with caches that grow; with left padding and labels as without a prefix.
    A cache's `get_seq_length` leaves the prefix out for the caller, so that the next turn can go on
    from it.  A layer with a sliding window forgets the prefix as it forgets tokens (padding
    counts).

    Raises:
        UserError: a prefix of another model, or a model that has one or that another library
            quantised.  In forward passes: a cache of fixed size, of another batch size or filled
            without the prefix, a mask that is not [B, T so far], packed sequences, and activation
            checkpointing, which drops all that is cached.
    """
    _check_none(model)
    text = model.config.get_text_config(decoder=True)
    heads = {getattr(text, "num_key_value_heads", None), text.num_attention_heads}
    L, G, P, _ = prefix.keys_LGPd.shape
    if text.num_hidden_layers < L or G not in heads:
        raise UserError(
            f"prefix: is for {L} layers of {G} key heads, this model has {text.num_hidden_layers}"
            " layers or other heads; it is another model's"
        )
    reach = getattr(text, "max_position_embeddings", None)
    if reach is not None and reach <= P:
        raise UserError(f"prefix: its {P} tokens leave no room in the model's {reach} positions")
    prefix_quantizer(model).quantization_config.prefix = prefix.describe()
    decoder: Any = model.get_decoder()
    decoder.add_module("kv_prefix", _Store(prefix, model))
    decoder.register_forward_pre_hook(_put_in_front, with_kwargs=True)
    decoder.register_forward_hook(_withdraw_cache, with_kwargs=True)
    return model


def prefix_of(model: PreTrainedModel) -> Prefix | None:
    """The prefix that `model` reads everything behind; None if there is none."""
    store: Any = getattr(model.get_decoder(), "kv_prefix", None)
    if store is not None:
        return Prefix(tokens=store.tokens, keys_LGPd=store.keys, values_LGPd=store.values)
    return None


@contextmanager
def prefix_replaced(
    model: PreTrainedModel, keys_LGPd: Tensor, values_LGPd: Tensor
) -> Iterator[None]:
    """While open, `model` reads behind these, which may need gradients."""
    store: Any = model.get_decoder().kv_prefix
    before, store.keys, store.values = (store.keys, store.values), keys_LGPd, values_LGPd
    try:
        yield
    finally:
        store.keys, store.values = before


class _Store(nn.Module):
    """The prefix as part of a model: it goes with it to devices and dtypes, not to its state."""

    def __init__(self, prefix: Prefix, model: PreTrainedModel) -> None:
        super().__init__()
        self.tokens = prefix.tokens
        for name, x in (("keys", prefix.keys_LGPd), ("values", prefix.values_LGPd)):
            self.register_buffer(name, x.to(model.device, model.dtype), persistent=False)

    def extra_repr(self) -> str:  # which tells models apart that state_dict() does not
        numbers = torch.stack([*self.buffers()]).float().cpu().numpy()
        return f"tokens={self.tokens}, sha256={hashlib.sha256(numbers.tobytes()).hexdigest()}"

    def fill(self, cache: Cache, batch: int) -> None:
        for layer, pair in enumerate(zip(self.keys, self.values, strict=True)):  # type: ignore[arg-type]
            cache.update(*(x_GPd.expand(batch, -1, -1, -1) for x_GPd in pair), layer)
        cache.kv_prefix = self.tokens  # type: ignore[attr-defined]
        cache.get_seq_length = MethodType(_length, cache)  # type: ignore[method-assign]
        cache.get_query_offset = MethodType(_query_offset, cache)  # type: ignore[method-assign]


# Methods of a cache that holds a prefix; bound, so that a copied cache uses its own.


def _length(cache: Any, layer_idx: int = 0) -> int:
    """Tokens in the cache: for the decoder all of them, for its caller all but the prefix."""
    length: int = type(cache).get_seq_length(cache, layer_idx)
    return length if cache.in_decoder or not length else length - len(cache.kv_prefix)


def _query_offset(cache: Any, layer_idx: int = 0) -> int:
    """As transformers', which asks for it within a decoder only."""
    if not cache.in_decoder:
        raise UserError("past_key_values: it holds a prefix, and this model has none")
    return _length(cache, layer_idx)


# Module-level functions that find the prefix on the module: a copied model uses its own.


def _put_in_front(
    module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the decoder is to be given instead, so that the prefix stands before it."""
    store: Any = module.kv_prefix
    if len(args) > 1:
        raise UserError("arguments: behind a prefix, all but input_ids must be given by name")
    if module.training and getattr(module, "is_activation_checkpointing", False):
        raise UserError("activation_checkpointing: it drops the prefix; switch it off")
    batch, fresh = input_of(args, kwargs).shape[:2]
    cache: Any = kwargs.get("past_key_values")
    if cache is None:
        cache = DynamicCache(config=module.config.get_text_config(decoder=True))
    elif getattr(cache, "is_compileable", False):
        raise UserError(f"past_key_values: {type(cache).__name__} has no room left for the prefix")
    length, held = len(store.tokens), type(cache).get_seq_length(cache)
    if held == 0:
        store.fill(cache, batch)
        held = length
    elif getattr(cache, "kv_prefix", None) != store.tokens:
        raise UserError("past_key_values: it was filled without this model's prefix")
    past, filled = held - length, len(cache.layers[0].keys)
    if past < 0:
        raise UserError(f"past_key_values: {-past} tokens of the prefix were cropped from it")
    if filled != batch:
        raise UserError(f"past_key_values: holds {filled} sequences, the input {batch}")
    own = past + fresh
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    kwargs = kwargs | {"past_key_values": cache}
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != (batch, own):
            found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise UserError(f"attention_mask: {found} is not [{batch}, {own}], the prefix left out")
        kwargs["attention_mask"] = torch.cat([mask.new_ones(batch, length), mask], 1)
    if positions is not None:
        counted = torch.arange(past, own, device=positions.device)
        if mask is None and not bool((positions == counted).all()):
            raise UserError(
                f"position_ids: without a mask they must be {past} .. {own - 1}, the prefix"
                " left out; packed sequences cannot all stand behind it"
            )
        if mask is not None and fresh > 1 and not is_one_sequence(positions, mask):
            raise UserError(
                "position_ids: they restart; packed sequences cannot all stand behind a prefix"
            )
        kwargs["position_ids"] = positions + length
    cache.in_decoder = True
    return args, kwargs


def _withdraw_cache(
    module: PreTrainedModel, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Without `use_cache`, none is handed back; otherwise its length is the caller's again."""
    kwargs["past_key_values"].in_decoder = False
    wanted = kwargs.get("use_cache")
    if wanted is None:
        wanted = module.config.use_cache
    if not wanted and isinstance(output, ModelOutput):
        output["past_key_values"] = None
    return output


def _check_none(model: PreTrainedModel) -> None:
    if prefix_of(model) is not None:
        raise UserError("model: it has a prefix already; give the model without it")
