"""Conversion that moves a pretrained model's attention sink into a null, without training.

In a pretrained model, heads without relevant keys attend to the first token, whatever it is.  Its
key and value are almost the same in every sequence, and its activations are massive (Sun et al.
2024, arXiv 2402.17762).  `null_from_sink` gives every head one more key and value, which are those
of the first token on average.  Every query sees them as if they were at position 0 of its sequence,
as those of a prefix token that shifts no position.  The heads then attend to this null, and the
first token remains an ordinary token.

Some models have secondary sinks: tokens with massive activations later in the sequence.  More nulls
can replace them.  Each is made from one token, which is found by trying those with the largest
activations.

Axes: H query heads, G key heads, d head width; N windows, B windows in a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.hub.convert import convert
from oasis_attn.hub.model_info import eval_mode
from oasis_attn.hub.null_options import check_null_from_sink
from oasis_attn.modeling.attention import AttentionCall, observe_attention
from oasis_attn.modeling.decoder_map import decoder_map
from oasis_attn.modeling.families import family_of
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM

NORMALIZER = "key_value_null"
CANDIDATES = 8
"""Tokens that are tried for each null after the first."""
_ROWS = 4  # windows per forward pass
_TOKENS = 256  # sequences of one token per forward pass


class SinkConversion(NamedTuple):
    """A converted model.

    Attributes:
        model: the model with its nulls.
        tokens: the tokens that the nulls after the first are made from, in order.
    """

    model: OasisForCausalLM
    tokens: tuple[int, ...]


class _Null(NamedTuple):
    """The key and the value of one null: for each layer, `[H, d]`."""

    keys: list[Tensor]
    values: list[Tensor]


def null_from_sink(
    model: PreTrainedModel,
    ids_NT: Tensor,
    *,
    variant: str = "kv_null",
    nulls: int = 1,
    on_try: Callable[[], None] = lambda: None,
    **overrides: Any,
) -> SinkConversion:
    """Convert a pretrained model, with nulls that have the keys and values of its sinks.

    The result does not compute the same function: the first null is a key that the model did not
    have.  `convert` is the exact conversion.

    The key and the value of the first null are the means over all tokens of the windows, each of
    which runs alone, as the first token of a sequence.  They should be text without BOS: a model
    whose null is made from BOS continues to treat BOS as a sink.

    For each null after the first, the tokens with the largest activations (relative to the median
    token of a layer) are tried in the model that has the nulls found so far: the token runs alone,
    and its keys and values are those of the null.  The token that decreases `activation_size` most
    is kept.  If none decreases it, the search ends.

    Args:
        model: a native model of a supported family (not an OASIS model).  It remains usable and
            shares its weights with the result.
        ids_NT: windows of text, int64.
        variant: a name in `variants()`; its token normalizer is replaced by `key_value_null`.
        nulls: maximum number of nulls of each head.
        on_try: is called before each token is tried, `CANDIDATES` times for each null but one.
        overrides: settings of `OasisConfig` that replace those of the variant.

    Raises:
        UserError: the family is not supported or has sinks of its own, a setting would change the
            function by other means than the null, or an argument is out of range.
    """
    check_null_from_sink(overrides, nulls=nulls)
    _check_ids(model, ids_NT)
    if family_of(model.config.get_text_config(decoder=True)).sinks:
        raise UserError(
            f"model: family {model.config.model_type!r} has learned sinks of its own, which are"
            " nulls already; use the exact conversion"
        )
    with eval_mode(model), torch.no_grad():
        found = [_null_of_tokens(model, ids_NT.flatten())]
        tokens: list[int] = []
        while len(found) < nulls:
            token = _best_token(model, found, ids_NT, on_try)
            if token is None:
                break
            found.append(_null_of_tokens(_with_nulls(model, found), torch.tensor([token])))
            tokens.append(token)
    return SinkConversion(_with_nulls(model, found, variant, **overrides), tuple(tokens))


def _check_ids(model: PreTrainedModel, ids_NT: Tensor) -> None:
    shape = tuple(ids_NT.shape)
    if ids_NT.dtype != torch.int64 or ids_NT.ndim != 2 or not ids_NT.numel():
        raise UserError(f"ids_NT: {ids_NT.dtype} {shape} is not int64 [windows, tokens]")
    size = model.config.get_text_config(decoder=True).vocab_size
    low, high = int(ids_NT.min()), int(ids_NT.max())
    if low < 0 or high >= size:
        raise UserError(f"ids_NT: token ids {low} .. {high} are not all in 0 .. {size - 1}")


@torch.no_grad()
def _with_nulls(
    model: PreTrainedModel, nulls: list[_Null], variant: str = "kv_null", **overrides: Any
) -> OasisForCausalLM:
    """`model` with these nulls."""
    normalizer = {"name": NORMALIZER, "nulls": len(nulls)} if len(nulls) > 1 else NORMALIZER
    converted = convert(model, variant, token_normalizer=normalizer, **overrides)
    for index, layer in enumerate(converted.model.layers):
        layer.null_logit.zero_()
        layer.null_key.copy_(torch.stack([null.keys[index] for null in nulls], 1))
        layer.null_value.copy_(torch.stack([null.values[index] for null in nulls], 1))
    return converted


def _null_of_tokens(model: PreTrainedModel, ids_N: Tensor) -> _Null:
    """The mean key and value of tokens, each of which is the first and only one of a sequence."""
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}

    def add(call: AttentionCall) -> None:
        groups = call.query_BHTd.shape[1] // call.key_BGSd.shape[1]
        for sums, x_BGSd in ((keys, call.key_BGSd), (values, call.value_BGSd)):
            x_Hd = x_BGSd[:, :, 0].double().sum(0).repeat_interleave(groups, 0)
            sums[call.layer] = sums.get(call.layer, 0) + x_Hd / len(ids_N)

    with observe_attention(model, add):
        for ids_B in ids_N.split(_TOKENS):
            _run(model, ids_B[:, None])
    layers = range(len(decoder_map(model).layers))
    return _Null([keys[layer] for layer in layers], [values[layer] for layer in layers])


def _best_token(
    model: PreTrainedModel, found: list[_Null], ids_NT: Tensor, on_try: Callable[[], None]
) -> int | None:
    """The token whose null decreases `activation_size` most; None if none does."""
    current = _with_nulls(model, found)
    peaks_LNT = token_peaks(current, ids_NT)
    sizes = {None: activation_size(peaks_LNT)}
    for token in _largest_tokens(peaks_LNT, ids_NT):
        on_try()
        longer = [*found, _null_of_tokens(current, torch.tensor([token]))]
        sizes[token] = activation_size(token_peaks(_with_nulls(model, longer), ids_NT))
    return min(sizes, key=lambda token: sizes[token])


def _largest_tokens(peaks_LNT: Tensor, ids_NT: Tensor) -> list[int]:
    """The tokens with the largest peaks relative to those of the median token of a layer."""
    median_L = peaks_LNT.flatten(1).median(-1).values
    relative_NT = (peaks_LNT / median_L[:, None, None]).amax(0)
    order = relative_NT.flatten().argsort(descending=True, stable=True)
    found = dict.fromkeys(ids_NT.flatten()[order].tolist())
    return list(found)[:CANDIDATES]


def activation_size(peaks_LNT: Tensor) -> float:
    """The geometric mean over layers of max |h|, from the result of `token_peaks`."""
    return float(peaks_LNT.amax((1, 2)).double().log().mean().exp())


@torch.no_grad()
def token_peaks(model: PreTrainedModel, ids_NT: Tensor) -> Tensor:
    """max |h| of each token over the channels of each layer's output, `[L, N, T]`, float32."""
    peaks: list[list[Tensor]] = []
    with ExitStack() as stack:
        for layer in decoder_map(model).layers:
            series: list[Tensor] = []
            peaks.append(series)

            def see(_module: Any, _args: Any, output: Any, series: list[Tensor] = series) -> None:
                x_BTD = output[0] if isinstance(output, tuple) else output
                series.append(x_BTD.abs().amax(-1).float().cpu())

            stack.callback(layer.module.register_forward_hook(see).remove)
        for ids_BT in ids_NT.split(_ROWS):
            _run(model, ids_BT)
    return torch.stack([torch.cat(series) for series in peaks])


def _run(model: PreTrainedModel, ids_BT: Tensor) -> None:
    model.base_model(input_ids=ids_BT.to(model.device), use_cache=False)
