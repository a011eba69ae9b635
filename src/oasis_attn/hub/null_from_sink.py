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
activations.  In the end, the MLP neurons that write massive activations can be pruned, see
`massive_neurons`.

Axes: L layers, H query heads, G key heads, S keys, d head width; N windows, B sequences in a batch,
T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.hub.key_value_nulls import (
    Null,
    check_finite,
    fitted_values,
    mean_null,
    set_nulls,
    with_disabled_nulls,
    with_nulls,
)
from oasis_attn.hub.massive_neurons import Neuron, prune_massive_neurons
from oasis_attn.hub.model_info import eval_mode
from oasis_attn.hub.null_options import check_null_from_sink
from oasis_attn.hub.token_peaks import TOKENS_PER_PASS, activation_size, token_peaks
from oasis_attn.modeling.families import family_of
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM

CANDIDATES = 4
"""Tokens that are tried for each null."""
_SEARCH_WINDOWS, _SEARCH_TOKENS = 8, 128  # of the windows that they are tried on
_MASSIVE = 10  # times the activations of the median token
_OCCURRENCES = 16  # of a token, which its null is the mean of


class SinkConversion(NamedTuple):
    """A converted model.

    Attributes:
        model: the model with its nulls.
        layer_0: the token whose key and value the first null has in layer 0; None if it has no
            other token there than in the other layers.
        tokens: the tokens that the nulls after the first were made from, in order.
        neurons: the MLP neurons that were pruned, in order.
    """

    model: OasisForCausalLM
    layer_0: int | None
    tokens: tuple[int, ...]
    neurons: tuple[Neuron, ...]


def null_from_sink(
    model: PreTrainedModel,
    ids_NT: Tensor,
    *,
    variant: str = "kv_null",
    nulls: int = 1,
    prune_neurons: int = 0,
    first_token: int | None = None,
    on_try: Callable[[], None] = lambda: None,
    **overrides: Any,
) -> SinkConversion:
    """Convert a pretrained model, with nulls that have the keys and values of its sinks.

    The result does not compute the same function: the first null is a key that the model did not
    have.  `convert` is the exact conversion.

    The key and the value of the first null are the means over all tokens of the windows, each of
    which runs alone, as the first token of a sequence.  They should be text without BOS.  The
    values of all layers but layer 0 are then fitted to the outputs of attention, and again, with
    those of the other nulls, after the last null is found; see `fitted_values`.

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
        prune_neurons: maximum number of neurons for `prune_massive_neurons`, after the nulls.
        first_token: the first null has the key and the value of this token, as the first token of a
            sequence, in place of the means; the value is not fitted.
        on_try: is called before each token is tried, `CANDIDATES` times at most for each null, and
            before each neuron.
        overrides: settings of `OasisConfig` that replace those of the variant.

    Raises:
        UserError: the family is not supported or has sinks of its own, the weights are quantized, a
            setting would change the function by other means than the null, or an argument is out of
            range.
    """
    check_null_from_sink(overrides, nulls=nulls, prune_neurons=prune_neurons)
    _check_ids("ids_NT", model, ids_NT)
    first_11 = None if first_token is None else torch.tensor([[first_token]])
    if first_11 is not None:
        _check_ids("first_token", model, first_11)
    # Raises if the model or a setting cannot work.
    with_disabled_nulls(model, 1, variant, overrides)
    if family_of(model.config.get_text_config(decoder=True)).sinks:
        raise UserError(
            f"model: family {model.config.model_type!r} has learned sinks of its own, which are"
            " nulls already; use the exact conversion"
        )
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:  # `quantize_` of torchao leaves no other trace
            raise UserError(
                f"model: the weight {name} is a {type(parameter).__name__}; convert the original"
                " model, then quantize the result"
            )
    ids_NT = ids_NT.cpu()  # as are the results of `token_peaks`
    with eval_mode(model), torch.no_grad():
        layer_0, first = (
            _first_null(model, ids_NT, on_try)
            if first_11 is None
            else (None, mean_null(model, [first_11]))
        )
        fitted = first_11 is None and ids_NT.shape[1] > 1
        means = [first]
        found = fitted_values(model, means, ids_NT) if fitted else means
        tokens: list[int] = []
        while len(means) < nulls:
            windows_NT = ids_NT[:_SEARCH_WINDOWS, :_SEARCH_TOKENS]
            better = _best_null(model, [*found, *means[1:]], windows_NT, on_try)
            if better is None:
                break
            tokens.append(better[0])
            means.append(better[1])
        if fitted and tokens:
            found = fitted_values(model, means, ids_NT)
        converted = with_disabled_nulls(model, len(means), variant, overrides)
        set_nulls(converted, found if fitted else means)
        neurons = prune_massive_neurons(converted, ids_NT, prune_neurons, on_try=on_try)
    return SinkConversion(converted, layer_0, tuple(tokens), neurons)


def _check_ids(name: str, model: PreTrainedModel, ids_NT: Tensor) -> None:
    shape = tuple(ids_NT.shape)
    if ids_NT.dtype != torch.int64 or ids_NT.ndim != 2 or not ids_NT.numel():
        raise UserError(f"{name}: {ids_NT.dtype} {shape} is not int64 [windows, tokens]")
    size = model.config.get_text_config(decoder=True).vocab_size
    low, high = int(ids_NT.min()), int(ids_NT.max())
    if low < 0 or high >= size:
        raise UserError(f"{name}: token ids {low} .. {high} are not all in 0 .. {size - 1}")


def _first_null(
    model: PreTrainedModel, ids_NT: Tensor, on_try: Callable[[], None]
) -> tuple[int | None, Null]:
    """The first null, and the token whose key and value it has in layer 0 (None: the mean)."""
    mean = mean_null(model, ids_NT.reshape(-1, 1).split(TOKENS_PER_PASS))
    distinct_N, counts_N = ids_NT.unique(return_counts=True)

    def peaks_LN1(null: Null) -> Tensor:
        return token_peaks(with_nulls(model, [null]), distinct_N.unsqueeze(1))

    found_LN1 = peaks_LN1(mean)
    least = activation_size(found_LN1)
    best: tuple[int | None, Null] = None, mean
    if not (found_LN1 > _MASSIVE * found_LN1.median(1, keepdim=True).values).any():
        return best
    for token in distinct_N[counts_N.argsort(descending=True, stable=True)[:CANDIDATES]].tolist():
        on_try()
        keys, values = mean_null(model, [torch.tensor([[token]])])
        null = Null([keys[0], *mean.keys[1:]], [values[0], *mean.values[1:]])
        if (size := activation_size(peaks_LN1(null))) < least:
            least, best = size, (token, null)
    return best


def _best_null(
    model: PreTrainedModel, found: list[Null], ids_NT: Tensor, on_try: Callable[[], None]
) -> tuple[int, Null] | None:
    """The null that decreases `activation_size` most, and its token; None if none does."""
    current = with_nulls(model, found)
    peaks_LNT = token_peaks(current, ids_NT)
    check_finite(model, "activations", [peaks_LNT])
    least, best = activation_size(peaks_LNT), None
    for token, sequences in _candidates(peaks_LNT, ids_NT):
        on_try()
        null = mean_null(current, sequences)
        size = activation_size(token_peaks(with_nulls(model, [*found, null]), ids_NT))
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
