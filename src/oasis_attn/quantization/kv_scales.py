"""Scales of a key-value cache in FP8, which the format compressed-tensors stores with a model.

Engines keep each key, after the rotary embedding, and each value x as the E4M3 number nearest to
x / scale.  Every attention layer has one scale for its keys (`k_scale`) and one for its values
(`v_scale`): the largest |x| of the calibration text divided by 448, the largest E4M3 number.

The compressed-tensors library puts its own cache in place of the argument `past_key_values` of each
attention layer, and rounds what the layer stores in it, in forward passes without a cache, too.
The scales are measured with this cache, so that they are of the numbers that the library rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.errors import one_line
from oasis_attn.hub.prefix import prefix_of, without_prefix
from oasis_attn.quantization.calibration import run_batch
from oasis_attn.quantization.compressed_tensors_format import FP8_CACHE, arguments
from oasis_attn.quantization.observers import MinMaxObserver
from oasis_attn.quantization.options import COMPRESSED_TENSORS
from oasis_attn.quantization.plain_model import refusal, without_weights
from oasis_attn.quantization.primitives import compute_qparams

_TOKENS = 8  # of the text on which a model is checked


@torch.no_grad()
def kv_scales(model: PreTrainedModel, calibration: Iterable[Tensor]) -> dict[str, Tensor]:
    """The scales of the key-value cache, float32 [1], by tensor name (`layers.0.attn.k_scale`).

    Args:
        model: a quantized model that `check_kv_cache` accepts.  If it has a prefix, the prefix is
            computed from its tokens, as in an engine.
        calibration: batches of token ids [B, T].
    """
    prefix = prefix_of(model)
    first = torch.tensor([] if prefix is None else prefix.tokens, dtype=torch.int64)
    plain = model if prefix is None else without_prefix(model)
    with _observed(plain) as observed:
        for ids_BT in calibration:
            ids_BT = ids_BT.cpu()
            run_batch(plain, torch.cat([first.expand(len(ids_BT), -1), ids_BT], 1))
    return {
        f"{name}.{kind}_scale": compute_qparams(*observer.range(), FP8_CACHE).scale.float()
        for name, layer in observed.items()
        for kind, observer in layer.observers.items()
    }


@torch.no_grad()
def check_kv_cache(model: PreTrainedModel, ids_T: Tensor) -> None:
    """Raise `Refusal` unless compressed-tensors can round everything that `model` caches.

    Args:
        model: a model without prefix, quantized or not; it reads the first few of the tokens.
        ids_T: token ids.
    """
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = QuantizationConfig(config_groups={}, kv_cache_scheme=arguments(FP8_CACHE))
    try:
        apply_quantization_config(without_weights(model), config, show_progress=False)
    except Exception as error:  # of reading any family's configuration
        reason = one_line(error).partition(". ")[0]
        raise _refusal(f"compressed-tensors cannot apply it ({reason})") from error
    names = [name for name, _ in _layers(model)]
    if not names:
        raise _refusal("compressed-tensors finds no attention layers that cache keys and values")
    for name, module in model.named_modules():
        if name in names and hasattr(module, "kv_b_proj"):
            raise _refusal(f"{name} caches latent vectors in place of keys and values")
        if getattr(module, "is_kv_shared_layer", False):
            raise _refusal(f"{name} reads the cache of another layer, and has no scales of its own")
    ids_BT = ids_T[None, :_TOKENS].to(model.device)
    with _observed(model) as observed:
        try:
            model(input_ids=ids_BT, use_cache=False)
            output = model(input_ids=ids_BT, use_cache=True)
        except Exception as error:  # a family may use its cache in any way
            raise _refusal(
                f"the family {model.config.model_type!r} does not accept the library's cache"
                f" ({type(error).__name__}: {one_line(error)})"
            ) from error
    for name, layer in observed.items():
        if len(layer.stored) != 2:  # in two forward passes
            raise _refusal(
                f"{name} stores keys and values {len(layer.stored) / 2:g} times in a forward pass,"
                " not once"
            )
    cache = getattr(output, "past_key_values", None)
    cache = getattr(cache, "self_attention_cache", cache)
    held = {
        index
        for index, layer in enumerate(getattr(cache, "layers", ()))
        if getattr(layer, "keys", None) is not None and layer.keys.numel()
    }
    reached = {index for layer in observed.values() for index in layer.stored}
    if held != reached:
        raise _refusal(
            f"compressed-tensors would round the cache of the layers {sorted(reached)}, and the"
            f" model caches keys and values in the layers {sorted(held)}"
        )


def _refusal(reason: str) -> Exception:
    return refusal(
        COMPRESSED_TENSORS,
        f"its key-value cache cannot be in FP8: {reason}",
        "; leave out --kv-cache (kv_cache=None)",
    )


def _layers(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """The attention layers whose cache the library rounds."""
    from compressed_tensors.quantization import is_cached_attention_module

    return [each for each in model.named_modules() if is_cached_attention_module(each[1])]


class _Layer:
    """What one attention layer stored: the range of keys and values, and the cache's layers."""

    def __init__(self, name: str) -> None:
        self.observers = {
            kind: MinMaxObserver(FP8_CACHE, f"{name}.{kind}_scale: the cache") for kind in "kv"
        }
        self.stored: list[int] = []

    def observe(self, _cache: Any, args: Any, kwargs: Any) -> None:
        self._observe(*args, **kwargs)

    def _observe(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> None:
        self.observers["k"].update(key_states)
        self.observers["v"].update(value_states)
        self.stored.append(layer_idx)


@contextmanager
def _observed(model: PreTrainedModel) -> Iterator[dict[str, _Layer]]:
    """Context in which the attention layers of `model` store into the library's cache."""
    from oasis_attn.modeling.hf_compat import QuantizedKVCache

    observed: dict[str, _Layer] = {}
    handles = []
    for name, module in _layers(model):
        observed[name] = _Layer(name)
        cache = QuantizedKVCache(model.config, module)
        handles += [
            cache.register_forward_pre_hook(observed[name].observe, with_kwargs=True),
            module.register_forward_pre_hook(partial(_replace_cache, cache), with_kwargs=True),
        ]
    try:
        yield observed
    finally:
        for handle in handles:
            handle.remove()


def _replace_cache(cache: Any, _module: Any, args: Any, kwargs: Any) -> Any:
    cache.add_past_key_values(kwargs.get("past_key_values"))
    return args, kwargs | {"past_key_values": cache}
