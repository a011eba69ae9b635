"""Nulls with keys and values: their means over text, and values that keep the outputs of attention.

Axes: L layers, H query heads, G key heads, M nulls, S keys, d head width, D width of the output
projection, I = H * d, J = G * d; N windows, B sequences in a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.hub.convert import convert
from oasis_attn.hub.token_peaks import batches, run_text
from oasis_attn.modeling.attention import AttentionCall, observe_attention
from oasis_attn.modeling.decoder_map import decoder_map
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM

_FITTED_TOKENS = 4096  # that values are fitted on, unless a window has more
_RIDGE = 0.01  # of the fit of values, as a fraction of the diagonal's mean
_CHANGE = 0.1  # of values by the fit, that is expected before it, as a fraction of their size
_SWEEPS = 3  # over several nulls, each of which is fitted with the values of the others
_QUERIES = 128  # whose attention matrix is computed at a time


class Null(NamedTuple):
    """The key and the value of one null: for each layer, `[G, d]`.

    Query heads that share a key head share them too, so that the null equals a stored prefix.
    """

    keys: list[Tensor]
    values: list[Tensor]


def with_disabled_nulls(
    model: PreTrainedModel, nulls: int, variant: str, overrides: dict[str, Any]
) -> OasisForCausalLM:
    """`model` with so many nulls, which are switched off; it shares its weights with `model`."""
    normalizer = {"name": "key_value_null", "nulls": nulls} if nulls > 1 else "key_value_null"
    return convert(model, variant, token_normalizer=normalizer, **overrides)


def set_nulls(converted: OasisForCausalLM, nulls: list[Null]) -> None:
    """Give `converted` these nulls, in place."""
    converted.config.null_logit = 0.0  # no longer that of a null that is switched off
    for index, layer in enumerate(converted.model.layers):
        layer.null_logit.zero_()
        for parameter, found in (
            (layer.null_key, [null.keys[index] for null in nulls]),
            (layer.null_value, [null.values[index] for null in nulls]),
        ):
            parameter.copy_(_per_query_head(torch.stack(found, 1), parameter.shape[0], 0))


def with_nulls(model: PreTrainedModel, nulls: list[Null]) -> OasisForCausalLM:
    """`model` with these nulls and the plain sum of residuals."""
    converted = with_disabled_nulls(model, len(nulls), "kv_null", {})
    set_nulls(converted, nulls)
    return converted


def mean_null(model: PreTrainedModel, sequences: Iterable[Tensor]) -> Null:
    """The mean key and value of the last tokens of sequences, which are at position 0.

    Args:
        model: the model, with the nulls found so far.
        sequences: token ids, each [B, T].
    """
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}

    def add(call: AttentionCall) -> None:
        for sums, x_BGSd in ((keys, call.key_BGSd), (values, call.value_BGSd)):
            sums[call.layer] = sums.get(call.layer, 0) + x_BGSd[:, :, -1].double().sum(0)

    count = longest = 0
    with observe_attention(model, add):
        for ids_BT in sequences:
            longest = max(longest, ids_BT.shape[1])
            positions_1T = torch.arange(1 - ids_BT.shape[1], 1, device=model.device)[None]
            run_text(model, ids_BT, position_ids=positions_1T)
            count += len(ids_BT)
    layers = range(len(decoder_map(model).layers))
    null = Null(*([sums[layer] / count for layer in layers] for sums in (keys, values)))
    found = [*null.keys, *null.values]
    if longest > 1 and not _are_finite(found):
        raise UserError(
            "nulls: keys and values of a null are not finite; family"
            f" {model.config.get_text_config(decoder=True).model_type!r} may not be defined for"
            " positions below 0, which nulls after the first need; use 1"
        )
    check_finite(model, "keys and values", found)
    return null


def fitted_values(model: PreTrainedModel, nulls: list[Null], ids_NT: Tensor) -> list[Null]:
    """`nulls` with the values that keep the outputs of attention closest to those of `model`.

    With the probability n_h of a null in query head h, the head's columns W_h of the output
    projection, and e_h, the output of h in `model` less what the keys and the other nulls add to it
    in the converted model, the values of a layer are the v that minimize

        sum over queries of |sum over h of W_h (n_h v_g - e_h)|^2 + r sum over g of |v_g - mean_g|^2

    where g is the key head of h; r is the fraction `_RIDGE` of the diagonal's mean of the normal
    equations, plus s^2 / c^2: s is the root mean square of W_h (n_h mean_g - e_h), summed over h,
    and c is the fraction `_CHANGE` of that of the means.  This is the ratio of noise to prior
    variance of a Bayesian regression.  It keeps values near the means if the queries are few or the
    null probabilities small.  Several nulls are fitted in turn, `_SWEEPS` times.

    Queries of first tokens do not count, nor does what a family has between its heads and the
    projection (a gate in afmoe and laguna, a norm in bitnet).  Layer 0 keeps its values, which
    make the first token an ordinary one.  The other layers are fitted in order: the inputs of a
    layer are those after the fit of the layers before it.  All windows pass through the converted
    model once, in one batch, and each attention module is computed again with its new values.

    Args:
        model: the model before conversion.
        nulls: the values are the means above.
        ids_NT: windows of text, of two tokens at least.
    """
    ids_NT = ids_NT[:: -(-ids_NT.numel() // _FITTED_TOKENS)]
    outputs: dict[int, list[Tensor]] = {}
    with observe_attention(
        model, lambda call: outputs.setdefault(call.layer, []).append(_output_of_keys(call))
    ):
        for ids_BT in batches(ids_NT):
            run_text(model, ids_BT)

    converted = with_nulls(model, nulls)
    fitted = [Null(null.keys, list(null.values)) for null in nulls]
    latest: list[AttentionCall] = []

    def fit(attention: Any, args: Any, kwargs: Any, _output: Any) -> Any:
        call = latest[-1]
        latest.clear()
        layer = converted.model.layers[call.layer]
        e_BHTd = torch.cat(outputs.pop(call.layer)) - _output_of_keys(call)
        null_MBHT = _null_probabilities(call, layer.null_key)
        values_MGd = _least_squares(
            null_MBHT[..., 1:].double(),
            e_BHTd[:, :, 1:].double(),
            torch.stack([null.values[call.layer] for null in nulls]),
            layer.output_projection.weight.double(),
        )
        layer.null_value.copy_(_per_query_head(values_MGd, len(layer.null_value)).transpose(0, 1))
        for null, value_Gd in zip(fitted, values_MGd, strict=True):
            null.values[call.layer] = value_Gd
        return attention.forward(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(observe_attention(converted, latest.append))
        for layer in converted.model.layers[1:]:
            hook = layer.self_attn.register_forward_hook(fit, with_kwargs=True)
            stack.callback(hook.remove)
        run_text(converted, ids_NT)
    check_finite(model, "attention outputs", [x for null in fitted for x in null.values])
    return fitted


def check_finite(model: PreTrainedModel, what: str, found: Iterable[Tensor]) -> None:
    """Raise `UserError` if `found`, which is computed from `what` of `model`, is not finite."""
    if not _are_finite(found):
        raise UserError(f"model: its {what} are not finite in {model.dtype}")


def _are_finite(found: Iterable[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in found)


def _null_probabilities(call: AttentionCall, key_HMd: Tensor) -> Tensor:
    """The probability of each null, `[M, B, H, T]`."""
    if key_HMd.shape[1] == 1:
        return call.null_BHT.unsqueeze(0)
    logits_BHTM = call.logits(key_HMd)
    return (logits_BHTM.softmax(-1) * call.null_BHT.unsqueeze(-1)).movedim(-1, 0)


def _least_squares(
    null_MBHT: Tensor, e_BHTd: Tensor, mean_MGd: Tensor, weight_DI: Tensor
) -> Tensor:
    """The values of `fitted_values`, `[M, G, d]`; here, e is less what the keys add, and no null.

    Queries enter only into the normal equations of all nulls, which are computed once.
    """
    (M, G, d), H = mean_MGd.shape, null_MBHT.shape[2]
    gram_HdHd = (weight_DI.mT @ weight_DI).view(H, d, H, d)
    moments_MMHH = torch.einsum("mbht,nbgt->mnhg", null_MBHT, null_MBHT)
    products_MHHd = torch.einsum("mbht,bgtd->mhgd", null_MBHT, e_BHTd)
    right_MHd = torch.einsum("hdge,mhge->mhd", gram_HdHd, products_MHHd)
    errors_BTD = e_BHTd.transpose(1, 2).flatten(2) @ weight_DI.mT
    squares, count = errors_BTD.square().sum(), errors_BTD.numel()
    values_MGd = mean_MGd.clone()
    for sweep in range(_SWEEPS * M if M > 1 else 1):
        m = sweep % M
        values_MGd[m] = mean_MGd[m]
        values_MHd = _per_query_head(values_MGd, H)
        seen_MHHd = torch.einsum("hdge,mge->mhgd", gram_HdHd, values_MHd)
        slope_MHd = right_MHd - torch.einsum("mnhg,nhgd->mhd", moments_MMHH, seen_MHHd)
        noise = (squares - (values_MHd * (right_MHd + slope_MHd)).sum()).clamp(min=0) / count
        prior = _CHANGE**2 * mean_MGd[m].square().mean()  # may be 0: the equations are times it
        # The query heads of a key head have one value, so that their equations are added.
        matrix_HdHd = gram_HdHd * moments_MMHH[m, m][:, None, :, None]
        matrix_JJ = matrix_HdHd.view(G, H // G, d, G, H // G, d).sum((1, 4)).view(G * d, G * d)
        slope_J = slope_MHd[m].view(G, H // G, d).sum(1).flatten()
        matrix_JJ.diagonal().add_(_RIDGE * matrix_JJ.diagonal().mean())
        matrix_JJ.mul_(prior).diagonal().add_(noise + torch.finfo(matrix_JJ.dtype).tiny)
        values_MGd[m] += torch.linalg.solve(matrix_JJ, prior * slope_J).view(G, d)
    return values_MGd


def _per_query_head(x: Tensor, heads: int, dim: int = -2) -> Tensor:
    """`x`, whose dimension `dim` is key heads, repeated for this number of query heads."""
    return x.repeat_interleave(heads // x.shape[dim], dim)


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
