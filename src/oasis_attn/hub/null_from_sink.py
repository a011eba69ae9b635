"""Conversion that moves a pretrained model's attention sink into a null, without training.

In a pretrained model, heads without relevant keys attend to the first token, whatever it is.  Its
key and value are almost the same in every sequence, and its activations are massive (Sun et al.
2024, arXiv 2402.17762).  `null_from_sink` gives every head one more key and value, which are those
of the first token on average.  Every query sees them as if they were at position 0 of its sequence,
as those of a prefix token that shifts no position.  The heads then attend to this null, and the
first token remains an ordinary token.  The values are then fitted by least squares, so that the
outputs of attention are as close as possible to those of the original model.

Some models have secondary sinks: tokens with massive activations later in the sequence.  More nulls
can replace them.  Each is made from one token, which is found by trying those with the largest
activations.

Axes: L layers, H query heads, G key heads, S keys, d head width; N windows, B sequences in a batch,
T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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

CANDIDATES = 4
"""Tokens that are tried for each null."""
_SEARCH_WINDOWS, _SEARCH_TOKENS = 8, 128  # of the windows that they are tried on
_MASSIVE = 10  # times the activations of the median token
_OCCURRENCES = 16  # of a token, which its null is the mean of
_TOKENS = 1024  # per forward pass, unless a window has more
_FITTED_TOKENS = 4096  # that values are fitted on, unless a window has more
_RIDGE = 0.01  # of the fit of values, as a fraction of the diagonal's mean
_CHANGE = 0.1  # of values by the fit, that is expected before it, as a fraction of their size
_QUERIES = 128  # whose attention matrix is computed at a time


class SinkConversion(NamedTuple):
    """A converted model.

    Attributes:
        model: the model with its nulls.
        layer_0: the token whose key and value the first null has in layer 0; None if it has no
            other token there than in the other layers.
        tokens: the tokens that the nulls after the first were made from, in order.
    """

    model: OasisForCausalLM
    layer_0: int | None
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
    first_token: int | None = None,
    on_try: Callable[[], None] = lambda: None,
    **overrides: Any,
) -> SinkConversion:
    """Convert a pretrained model, with nulls that have the keys and values of its sinks.

    The result does not compute the same function: the first null is a key that the model did not
    have.  `convert` is the exact conversion.

    The key and the value of the first null are the means over all tokens of the windows, each of
    which runs alone, as the first token of a sequence.  They should be text without BOS.  The
    values of all layers but layer 0 are then fitted to the outputs of attention, see `_fitted`.

    A model that was trained with BOS in front of every text has its sink on BOS.  `first_token`
    makes the first null from BOS, whose place it takes when BOS is left out of the texts.

    In layer 0, keys and values differ most between tokens, and with their mean, a few first tokens
    can keep activations that are more than ten times those of the median one.  Then the key and the
    value of each of the most frequent tokens are tried in layer 0, and the null with the smallest
    `activation_size` over first tokens is kept.

    For each null after the first, the tokens with the largest activations (relative to the median
    token of a layer) are tried, in the model that has the nulls found so far.  The key and the
    value are the means over the places at which the activations of the token are largest; positions
    are shifted so that the token is at position 0.  The token whose null decreases
    `activation_size` most is kept.  If none decreases it, the search ends.

    Args:
        model: a native model of a supported family (not an OASIS model).  It remains usable and
            shares its weights with the result.
        ids_NT: windows of text, int64.  Nulls after the first are searched on a part of them.
        variant: a name in `variants()`; its token normalizer is replaced by `key_value_null`.
        nulls: maximum number of nulls of each head.
        first_token: the first null has the key and the value of this token, as the first token of a
            sequence, in place of the means; the value is not fitted.
        on_try: is called before each token is tried, `CANDIDATES` times at most for each null.
        overrides: settings of `OasisConfig` that replace those of the variant.

    Raises:
        UserError: the family is not supported or has sinks of its own, a setting would change the
            function by other means than the null, or an argument is out of range.
    """
    check_null_from_sink(overrides, nulls=nulls)
    _check_ids("ids_NT", model, ids_NT)
    first_11 = None if first_token is None else torch.tensor([[first_token]])
    if first_11 is not None:
        _check_ids("first_token", model, first_11)
    _converted(model, 1, variant, overrides)  # raises for a model or a setting that cannot work
    if family_of(model.config.get_text_config(decoder=True)).sinks:
        raise UserError(
            f"model: family {model.config.model_type!r} has learned sinks of its own, which are"
            " nulls already; use the exact conversion"
        )
    ids_NT = ids_NT.cpu()  # as are the results of `token_peaks`
    with eval_mode(model), torch.no_grad():
        layer_0, first = (
            _first_null(model, ids_NT, on_try)
            if first_11 is None
            else (None, _mean_null(model, [first_11]))
        )
        if first_11 is None and ids_NT.shape[1] > 1:
            first = _fitted(model, first, ids_NT)
        found = [first]
        tokens: list[int] = []
        while len(found) < nulls:
            better = _best_null(model, found, ids_NT[:_SEARCH_WINDOWS, :_SEARCH_TOKENS], on_try)
            if better is None:
                break
            tokens.append(better[0])
            found.append(better[1])
        converted = _converted(model, len(found), variant, overrides)
        _set_nulls(converted, found)
    return SinkConversion(converted, layer_0, tuple(tokens))


def _check_ids(name: str, model: PreTrainedModel, ids_NT: Tensor) -> None:
    shape = tuple(ids_NT.shape)
    if ids_NT.dtype != torch.int64 or ids_NT.ndim != 2 or not ids_NT.numel():
        raise UserError(f"{name}: {ids_NT.dtype} {shape} is not int64 [windows, tokens]")
    size = model.config.get_text_config(decoder=True).vocab_size
    low, high = int(ids_NT.min()), int(ids_NT.max())
    if low < 0 or high >= size:
        raise UserError(f"{name}: token ids {low} .. {high} are not all in 0 .. {size - 1}")


def _converted(
    model: PreTrainedModel, nulls: int, variant: str, overrides: dict[str, Any]
) -> OasisForCausalLM:
    """`model` with so many nulls, which are switched off."""
    normalizer = {"name": "key_value_null", "nulls": nulls} if nulls > 1 else "key_value_null"
    return convert(model, variant, token_normalizer=normalizer, **overrides)


def _set_nulls(converted: OasisForCausalLM, nulls: list[_Null]) -> None:
    converted.config.null_logit = 0.0  # no longer that of a null that is switched off
    for index, layer in enumerate(converted.model.layers):
        layer.null_logit.zero_()
        layer.null_key.copy_(torch.stack([null.keys[index] for null in nulls], 1))
        layer.null_value.copy_(torch.stack([null.values[index] for null in nulls], 1))


def _with_nulls(model: PreTrainedModel, nulls: list[_Null]) -> OasisForCausalLM:
    converted = _converted(model, len(nulls), "kv_null", {})
    _set_nulls(converted, nulls)
    return converted


def _first_null(
    model: PreTrainedModel, ids_NT: Tensor, on_try: Callable[[], None]
) -> tuple[int | None, _Null]:
    """The first null, and the token whose key and value it has in layer 0 (None: the mean)."""
    mean = _mean_null(model, ids_NT.reshape(-1, 1).split(_TOKENS))
    distinct_N, counts_N = ids_NT.unique(return_counts=True)

    def peaks_LN1(null: _Null) -> Tensor:
        return token_peaks(_with_nulls(model, [null]), distinct_N.unsqueeze(1))

    found_LN1 = peaks_LN1(mean)
    least = activation_size(found_LN1)
    best: tuple[int | None, _Null] = None, mean
    if not (found_LN1 > _MASSIVE * found_LN1.median(1, keepdim=True).values).any():
        return best
    for token in distinct_N[counts_N.argsort(descending=True, stable=True)[:CANDIDATES]].tolist():
        on_try()
        keys, values = _mean_null(model, [torch.tensor([[token]])])
        null = _Null([keys[0], *mean.keys[1:]], [values[0], *mean.values[1:]])
        if (size := activation_size(peaks_LN1(null))) < least:
            least, best = size, (token, null)
    return best


def _mean_null(model: PreTrainedModel, batches: Iterable[Tensor]) -> _Null:
    """The mean key and value of the last tokens of sequences, which are at position 0.

    Args:
        model: the model, with the nulls found so far.
        batches: token ids, each [B, T].
    """
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}

    def add(call: AttentionCall) -> None:
        groups = call.query_BHTd.shape[1] // call.key_BGSd.shape[1]
        for sums, x_BGSd in ((keys, call.key_BGSd), (values, call.value_BGSd)):
            x_Gd = x_BGSd[:, :, -1].double().sum(0)
            sums[call.layer] = sums.get(call.layer, 0) + x_Gd.repeat_interleave(groups, 0)

    count = 0
    with observe_attention(model, add):
        for ids_BT in batches:
            positions_1T = torch.arange(1 - ids_BT.shape[1], 1, device=model.device)[None]
            _run(model, ids_BT, position_ids=positions_1T)
            count += len(ids_BT)
    layers = range(len(decoder_map(model).layers))
    null = _Null(*([sums[layer] / count for layer in layers] for sums in (keys, values)))
    if not all(x.isfinite().all() for x in (*null.keys, *null.values)):
        raise UserError(
            "nulls: keys and values of a null are not finite; family"
            f" {model.config.get_text_config(decoder=True).model_type!r} may not be defined for"
            " positions below 0, which nulls after the first need; use 1"
        )
    return null


def _fitted(model: PreTrainedModel, null: _Null, ids_NT: Tensor) -> _Null:
    """`null` with the values that keep the outputs of attention closest to those of `model`.

    With the null probability n_h of head h, its columns W_h of the output projection, and e_h, the
    output of h in `model` less what the keys add to it in the converted model, the values of a
    layer are the v that minimize

        sum over queries of |sum over h of W_h (n_h v_h - e_h)|^2 + r sum over h of |v_h - mean_h|^2

    where r is the fraction `_RIDGE` of the diagonal's mean of the normal equations, plus s^2 / c^2:
    s is the root mean square of W_h (n_h mean_h - e_h), summed over h, and c is the fraction
    `_CHANGE` of that of the means.  This is the ratio of noise to prior variance of a Bayesian
    regression.  It keeps values near the means if the queries are few or the null probabilities
    small.  Queries of first tokens do not count, nor does what a family has between its heads and
    the projection (a gate in afmoe and laguna, a norm in bitnet).  Layer 0 keeps its values, which
    make the first token an ordinary one.  The other layers are fitted in order: the inputs of a
    layer are those after the fit of the layers before it.  All windows pass through the converted
    model once, in one batch, and each attention module is computed again with its new values.
    """
    ids_NT = ids_NT[:: -(-ids_NT.numel() // _FITTED_TOKENS)]
    outputs: dict[int, list[Tensor]] = {}
    with observe_attention(
        model, lambda call: outputs.setdefault(call.layer, []).append(_output_of_keys(call))
    ):
        for ids_BT in ids_NT.split(max(1, _TOKENS // ids_NT.shape[1])):
            _run(model, ids_BT)

    converted = _with_nulls(model, [null])
    values = list(null.values)
    latest: list[AttentionCall] = []

    def fit(attention: Any, args: Any, kwargs: Any, _output: Any) -> Any:
        call = latest[-1]
        latest.clear()
        layer = converted.model.layers[call.layer]
        output_BHTd = torch.cat(outputs.pop(call.layer)) - _output_of_keys(call)
        values[call.layer] = _least_squares(
            call.null_BHT[:, :, 1:].double(),
            output_BHTd[:, :, 1:].double(),
            values[call.layer],
            layer.output_projection.weight.double(),
        )
        layer.null_value.copy_(values[call.layer].unsqueeze(1))
        return attention.forward(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(observe_attention(converted, latest.append))
        for layer in converted.model.layers[1:]:
            hook = layer.self_attn.register_forward_hook(fit, with_kwargs=True)
            stack.callback(hook.remove)
        _run(converted, ids_NT)
    return _Null(null.keys, values)


def _least_squares(null_BHT: Tensor, e_BHTd: Tensor, mean_Hd: Tensor, weight_DI: Tensor) -> Tensor:
    """The values of `_fitted`, `[H, d]`."""
    H, d = mean_Hd.shape
    rest_BHTd = e_BHTd - null_BHT.unsqueeze(-1) * mean_Hd.unsqueeze(1)
    gram_HdHd = (weight_DI.mT @ weight_DI).view(H, d, H, d)
    moments_HH = torch.einsum("bht,bgt->hg", null_BHT, null_BHT)
    matrix_II = (gram_HdHd * moments_HH[:, None, :, None]).reshape(H * d, H * d)
    products_HHd = torch.einsum("bht,bgtd->hgd", null_BHT, rest_BHTd)
    right_I = torch.einsum("hdge,hge->hd", gram_HdHd, products_HHd).flatten()
    matrix_II.diagonal().add_(_RIDGE * matrix_II.diagonal().mean())
    noise = (rest_BHTd.transpose(1, 2).flatten(2) @ weight_DI.mT).square().mean()
    prior = _CHANGE**2 * mean_Hd.square().mean()  # may be 0: the equations are multiplied by it
    matrix_II.mul_(prior).diagonal().add_(noise + torch.finfo(matrix_II.dtype).tiny)
    change_I: Tensor = torch.linalg.solve(matrix_II, prior * right_I)
    return mean_Hd + change_I.view(H, d)


def _output_of_keys(call: AttentionCall) -> Tensor:
    """What the keys add to the output of attention, `[B, H, T, d]`."""
    T = call.query_BHTd.shape[2]
    groups = call.query_BHTd.shape[1] // call.value_BGSd.shape[1]
    value_BHSd = call.value_BGSd.repeat_interleave(groups, 1)
    parts = []
    for start in range(0, T, _QUERIES):
        rows_BHTS = call.rows(start, min(start + _QUERIES, T))
        parts.append(rows_BHTS @ value_BHSd[:, :, : rows_BHTS.shape[3]].to(rows_BHTS.dtype))
    return torch.cat(parts, 2)


def _best_null(
    model: PreTrainedModel, found: list[_Null], ids_NT: Tensor, on_try: Callable[[], None]
) -> tuple[int, _Null] | None:
    """The null that decreases `activation_size` most, and its token; None if none does."""
    current = _with_nulls(model, found)
    peaks_LNT = token_peaks(current, ids_NT)
    least, best = activation_size(peaks_LNT), None
    for token, sequences in _candidates(peaks_LNT, ids_NT):
        on_try()
        null = _mean_null(current, sequences)
        size = activation_size(token_peaks(_with_nulls(model, [*found, null]), ids_NT))
        if size < least:
            least, best = size, (token, null)
    return best


def _candidates(peaks_LNT: Tensor, ids_NT: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """The tokens with the largest activations, and sequences [1, T] that end with the token.

    Each sequence is the start of a window, up to a place at which the activations of the token are
    at least half as large as at most.
    """
    median_L = peaks_LNT.flatten(1).median(-1).values
    relative_NT = (peaks_LNT / median_L[:, None, None]).amax(0)
    order = relative_NT.flatten().argsort(descending=True, stable=True)
    tokens_by_size = dict.fromkeys(ids_NT.flatten()[order].tolist())
    for token in list(tokens_by_size)[:CANDIDATES]:
        sizes_NT = relative_NT.where(ids_NT == token, 0)
        places = (sizes_NT >= sizes_NT.max() / 2).nonzero()[:_OCCURRENCES].tolist()
        yield token, [ids_NT[n, : t + 1][None] for n, t in places]


def activation_size(peaks_LNT: Tensor) -> float:
    """The size of the largest activations, from the result of `token_peaks`.

    The geometric mean over layers of the power mean over windows of max |h|, with the exponent 4:
    between the mean, which one large window does not change, and the maximum, which sees no other.
    """
    largest_LN = peaks_LNT.amax(2).double()
    return float(largest_LN.pow(4).mean(1).pow(1 / 4).log().mean().exp())


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
        for ids_BT in ids_NT.split(max(1, _TOKENS // ids_NT.shape[1])):
            _run(model, ids_BT)
    return torch.stack([torch.cat(series) for series in peaks])


def _run(model: PreTrainedModel, ids_BT: Tensor, **arguments: Any) -> None:
    model.base_model(input_ids=ids_BT.to(model.device), use_cache=False, **arguments)
