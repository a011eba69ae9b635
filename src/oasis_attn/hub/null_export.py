"""Nulls with keys and values leave the library as a stored prefix: a PEFT adapter.

The logit of a null is the product of its key with the query, which is rotated to its position t;
the key has no position.  A prefix of M entries shifts the text by M positions.  So the stored key
must be R k, where R is the rotation by M positions: (R q)(R k) = q k.  The value is stored as it
is.  With the adapter, the family's own model then computes the same function, except that positions
are shifted.

R is found from the model's own queries and keys of single tokens at the positions 0 and M, so that
nothing has to be known of the family's rotary embedding: which channels of a layer are rotated, in
which pairs and by which angles, or that none is.  In 16-bit models, R has their rounding.

Axes: L layers, H query heads, G key heads, M nulls, d head width; B tokens, P positions, N vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from oasis_attn.devices import is_out_of_memory
from oasis_attn.errors import UserError, one_line
from oasis_attn.hub.convert import without_additions
from oasis_attn.hub.peft_adapter import Adapter, checked_ids, is_close
from oasis_attn.hub.token_peaks import run_text
from oasis_attn.modeling.attention import observe_attention
from oasis_attn.modeling.attention_call import AttentionCall
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.families import family_of
from oasis_attn.modeling.layer import OUTPUT_BIAS, RoutedLayer
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.modeling.packing import smallest_window

NORMALIZER = "key_value_null"
_TOKENS = 64  # from which the rotation is found
_ERROR = 3e-4  # of a rotation, at most, as a fraction; and in 16 bits:
_ROUNDING = 4  # times the eps of the dtype
_DEPENDENT = 1e-12  # determinant of two channels, as a fraction of its largest possible value


def check_nulls(config: OasisConfig) -> None:
    """Raise `UserError` if the nulls of a model with this config cannot be a stored prefix."""
    text: Any = config.text_config
    if any(getattr(part, "quantization_config", None) for part in (config, text)):
        raise UserError(
            "model: it has nulls, and is quantized or has a prefix; export the model from which it"
            " was made"
        )
    if config.residual != "sum":
        raise _refusal(f"residual: {config.residual!r} is depth routing")
    for name in ("output_gate", "branch_norm"):
        if (value := getattr(config, name)) != "none":
            raise _refusal(f"{name}: {value!r} is not 'none'")
    if getattr(text, OUTPUT_BIAS, False):
        raise _refusal(f"{OUTPUT_BIAS}: True adds a bias to the output of attention")
    if family_of(text).sinks:
        raise _refusal(f"model: family {text.model_type!r} has sinks, which add to the null logits")
    rope = getattr(text, "rope_parameters", None) or {}
    # Some families have parameters for each type of layer.
    if any(isinstance(x, dict) and x.get("rope_type") == "dynamic" for x in (rope, *rope.values())):
        raise _refusal(
            "rope_parameters: rope_type 'dynamic' rotates by other angles in texts longer than"
            " max_position_embeddings"
        )
    nulls = int(config.normalizer.arguments.get("nulls", 1))
    longest, window = _longest(text), smallest_window(text)
    if longest is not None and nulls >= longest:
        raise _refusal(f"nulls: {nulls} are not fewer than the {longest} positions")
    if window is not None and (longest is None or window < longest):
        raise _refusal(
            f"sliding_window or attention_chunk_size: {window} is less than max_position_embeddings"
            f" ({longest}), so that a prefix would leave the window, but a null does not"
        )


@torch.no_grad()
def nulls_as_prefix(model: OasisForCausalLM) -> tuple[PreTrainedModel, Adapter]:
    """The family's own model, which shares the weights of `model`, and the nulls as its prefix.

    Raises:
        UserError: see `check_nulls`; a null logit is not 0; the query heads of one key head have
            different nulls; the keys of the family at position M are not a rotation of those at
            position 0; or the result does not compute the same.
    """
    check_nulls(model.config)
    for layer in model.model.layers:
        _check_layer(layer)
    native = without_additions(model)
    maps, heads = _rotations(native, model.model.layers[0].null_key.shape[1])
    keys, values = [], []
    for layer, map_dd, groups in zip(model.model.layers, maps, heads, strict=True):
        key_GMd, value_GMd = (
            _by_key_head(layer, name, groups) for name in ("null_key", "null_value")
        )
        keys.append((key_GMd.double() @ map_dd).to(key_GMd))
        values.append(value_GMd)
    if len({key_GMd.shape for key_GMd in keys}) > 1:
        raise _refusal(f"model: the layers of {_family(native)} differ in their key heads")
    metadata = {"nulls": str(keys[0].shape[1])}
    adapter = Adapter(torch.stack(keys), torch.stack(values), metadata)
    _check_logits(model, native, adapter)
    return native, adapter


def _check_layer(layer: RoutedLayer) -> None:
    logit, key, value = (getattr(layer, f"null_{name}") for name in ("logit", "key", "value"))
    if logit.any():
        largest = logit.flatten()[logit.abs().argmax()]
        raise _refusal(
            f"null_logit: layer {layer.index} has {largest:.3g}, and that of a prefix is 0 (if the"
            " null is off, `oasis convert --to-vanilla` removes it)"
        )
    if key.shape[2] != value.shape[2]:
        raise _refusal(
            f"model: the keys of {_family(layer.oasis_config)} have {key.shape[2]} channels and its"
            f" values {value.shape[2]}, which PEFT cannot store"
        )


def _by_key_head(layer: Any, name: str, groups: int) -> Tensor:
    """The keys or values of a layer's nulls, `[G, M, d]`."""
    x_HMd: Tensor = getattr(layer, name)
    x_GHMd = x_HMd.view(groups, -1, *x_HMd.shape[1:])
    difference = (x_GHMd - x_GHMd[:, :1]).abs().max()
    if difference:
        raise _refusal(
            f"{name}: layer {layer.index} has different nulls in query heads that share a key head"
            f" (by up to {difference:.3g}), and a prefix has one for each key head"
        )
    return x_GHMd[:, 0]


def _rotations(native: PreTrainedModel, shift: int) -> tuple[list[Tensor], list[int]]:
    """For each layer, the map `[d, d]` of row vectors by `shift` positions, and its key heads.

    Raises:
        UserError: it is not a rotation, or not the same at all positions.
    """
    longest = _longest(native.config.get_text_config(decoder=True))
    last = shift if longest is None else longest - 1
    near, heads = _vectors(native, [0, shift])
    # Some families have other frequencies in long texts, or scale queries by their position.
    far, _ = _vectors(native, [0, shift, last])
    # In bfloat16, `is_close` would not see that a family scales queries of long texts by 1.07.
    allowed = max(_ERROR, _ROUNDING * torch.finfo(native.dtype).eps)
    maps = []
    for layer in range(len(near)):
        start_Nd, end_Nd = near[layer]
        map_dd = _pairwise_map(start_Nd, end_Nd)
        identity = torch.eye(len(map_dd), device=map_dd.device, dtype=map_dd.dtype)
        again_Nd, moved_Nd, last_Nd = far[layer]
        start_N, last_N = start_Nd.norm(dim=-1), last_Nd.norm(dim=-1)
        scale_N = (last_N / start_N).where(start_N > 0, 1)
        same = (
            (start_Nd @ map_dd, end_Nd),
            (again_Nd @ map_dd, moved_Nd),
            (scale_N, torch.ones_like(scale_N)),
            (map_dd @ map_dd.mT, identity),
        )
        if not all((x - y).norm() <= allowed * y.norm() for x, y in same):
            raise _refusal(
                f"model: {_family(native)}: in layer {layer}, keys and queries at position {shift}"
                " are not those at position 0 with the same rotation in texts of all lengths"
                + _rounded(native)
            )
        maps.append(map_dd)
    return maps, heads


def _vectors(native: PreTrainedModel, positions: list[int]) -> tuple[list[Tensor], list[int]]:
    """For each layer, queries and keys of single tokens, `[P, N, d]`, and its key heads."""
    found: dict[int, Tensor] = {}
    heads: dict[int, int] = {}

    def add(call: AttentionCall) -> None:
        both = torch.cat([call.query_BHTd, call.key_BGSd], 1)
        found[call.layer] = both.double().unflatten(0, (len(positions), -1)).flatten(1, 3)
        heads[call.layer] = call.key_BGSd.shape[1]

    size = native.config.get_text_config(decoder=True).vocab_size
    ids_B = torch.linspace(0, size - 1, _TOKENS).long().repeat(len(positions))
    positions_B = torch.tensor(positions, device=native.device).repeat_interleave(_TOKENS)
    with observe_attention(native, add):
        run_text(native, ids_B[:, None], position_ids=positions_B[:, None])
    return [found[layer] for layer in sorted(found)], [heads[layer] for layer in sorted(heads)]


def _pairwise_map(start_Nd: Tensor, end_Nd: Tensor) -> Tensor:
    """The map A for which start A is closest to end, if every channel has at most one partner.

    Each channel of `end` is a combination of the same channel of `start` and of its partner, the
    one with which the combination is closest.
    """
    gram_dd, cross_dd = start_Nd.mT @ start_Nd, end_Nd.mT @ start_Nd
    own_d1, with_own_d1 = (x_dd.diagonal().unsqueeze(1) for x_dd in (gram_dd, cross_dd))
    # Rows: channels of `end`; columns: their partners.  Normal equations, by Cramer's rule.
    determinant_dd = own_d1 * own_d1.mT - gram_dd.square()
    usable_dd = determinant_dd > _DEPENDENT * own_d1 * own_d1.mT
    alone_d1 = (with_own_d1 / own_d1).where(own_d1 > 0, 1)  # a channel that is 0 stays as it is
    own_dd = (with_own_d1 * own_d1.mT - cross_dd * gram_dd) / determinant_dd
    partner_dd = (cross_dd * own_d1 - with_own_d1 * gram_dd) / determinant_dd
    own_dd, partner_dd = own_dd.where(usable_dd, alone_d1), partner_dd.where(usable_dd, 0)
    explained_dd = own_dd * with_own_d1 + partner_dd * cross_dd
    best_d1 = explained_dd.argmax(1, keepdim=True)
    map_dd = torch.zeros_like(gram_dd).scatter_(1, best_d1, partner_dd.gather(1, best_d1))
    map_dd.diagonal().add_(own_dd.gather(1, best_d1).squeeze(1))
    return map_dd.mT


def _check_logits(model: OasisForCausalLM, native: PreTrainedModel, adapter: Adapter) -> None:
    """Raise `UserError` unless `native` computes the same as `model` with the stored prefix."""
    count = adapter.keys_LGPd.shape[2]
    ids_1T = checked_ids(native)
    cache = DynamicCache()
    for layer, pair in enumerate(zip(adapter.keys_LGPd, adapter.values_LGPd, strict=True)):
        cache.update(*(x_GPd.unsqueeze(0) for x_GPd in pair), layer)
    try:
        positions_1T = torch.arange(count, count + ids_1T.shape[1], device=native.device)[None]
        output: Any = native(
            input_ids=ids_1T, past_key_values=cache, position_ids=positions_1T, use_cache=True
        )
    except Exception as error:  # of any type, if the family caches something else
        if is_out_of_memory(error):
            raise
        raise _refusal(
            f"model: {_family(native)} cannot read the nulls from its cache: {one_line(error)}"
        ) from error
    if not is_close(output.logits, model(input_ids=ids_1T).logits):
        raise _refusal(
            f"model: {_family(native)} does not compute the same with the nulls in its cache"
            + _rounded(native)
        )


def _longest(text: PreTrainedConfig) -> int | None:
    longest: int | None = getattr(text, "max_position_embeddings", None)
    return longest


def _family(model: PreTrainedModel | PreTrainedConfig) -> str:
    config = model.config if isinstance(model, PreTrainedModel) else model
    return f"family {config.get_text_config(decoder=True).model_type!r}"


def _rounded(model: PreTrainedModel) -> str:
    """What may help if rounding is the reason, as where it makes a router choose other experts."""
    if torch.finfo(model.dtype).bits > 16:
        return ""
    return f" in {str(model.dtype).removeprefix('torch.')} (--weights float32 rounds less)"


def _refusal(reason: str) -> UserError:
    return UserError(
        f"{reason}; a stored prefix cannot compute this, but --with-code writes the model with its"
        " code"
    )
