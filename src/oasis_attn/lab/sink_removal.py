"""Is the first token only a place to put weight, or is its value used?  Decoders without its part.

A sink is a no-op if its value is about 0: then nothing changes if its part of the output is removed
and the other weights are kept.  It is a bias if its value is used: then this has a cost.

Axes: B sequences, T queries, S keys, H heads, d head width, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from oasis_attn.modeling.attention import AttentionCall, observe_attention
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM

_SMALLEST = 1e-6


@contextmanager
def sink_removed(model: OasisForCausalLM, *, renormalize: bool) -> Iterator[None]:
    """Context in which the queries after the first one do not read the first token, in any layer.

    Args:
        model: without an output gate.
        renormalize: whether the weights of the other keys and of the null are divided by their sum.
            Otherwise they are kept, as if the value of the first token were 0.  The probability of
            the null that a null signal uses is kept in both cases.
    """
    parts: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(call: AttentionCall) -> None:
        groups = call.query_BHTd.shape[1] // call.value_BGSd.shape[1]
        first_BHd = call.value_BGSd[:, :, 0].repeat_interleave(groups, 1)
        p_BHT = call.column(0).clone()
        p_BHT[..., 0] = 0  # the first query has no other key
        parts[call.layer] = p_BHT.unsqueeze(-1), first_BHd.unsqueeze(2)

    def remove(layer: int) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            p_BHT1, first_BH1d = parts[layer]
            out_BHTd = inputs[0].unflatten(-1, (p_BHT1.shape[1], -1)).transpose(1, 2)
            out_BHTd = out_BHTd - p_BHT1 * first_BH1d
            if renormalize:
                out_BHTd = out_BHTd / (1 - p_BHT1).clamp(min=_SMALLEST)
            return (out_BHTd.transpose(1, 2).flatten(2),)

        return hook

    with ExitStack() as stack:
        stack.enter_context(observe_attention(model, observe))
        for layer, projection in enumerate(_output_projections(model)):
            stack.callback(projection.register_forward_pre_hook(remove(layer)).remove)
        yield


def _output_projections(model: OasisForCausalLM) -> list[Any]:
    layers: list[Any] = list(model.model.layers)
    return [layer.self_attn.o_proj for layer in layers]


class ValueNorms:
    """Norms of the values after the output projection, of the first token and of the null.

    A value of norm 1 is one that, with a weight of 1, adds as much to the residual as the mean
    value of the other tokens.
    """

    def __init__(self, model: OasisForCausalLM) -> None:
        self._outputs = _output_projections(model)
        self._nulls = [getattr(layer, "null_value", None) for layer in model.model.layers]
        self._rows: dict[int, dict[str, list[float]]] = {}

    def update(self, call: AttentionCall) -> None:
        """Add one attention call; each layer makes one."""
        heads = call.query_BHTd.shape[1]
        weight_HDd = self._outputs[call.layer].weight.unflatten(-1, (heads, -1)).transpose(0, 1)
        value_BHSd = call.value_BGSd.repeat_interleave(heads // call.value_BGSd.shape[1], 1)
        norm_BHS = (value_BHSd @ weight_HDd.mT).norm(dim=-1)
        others_H = norm_BHS[..., 1:].mean((0, 2))
        row = {"first": (norm_BHS[..., 0].mean(0) / others_H).tolist()}
        null_HMd: Tensor | None = self._nulls[call.layer]
        if null_HMd is not None:
            norm_HM = (null_HMd @ weight_HDd.mT).norm(dim=-1)
            row["null"] = (norm_HM.mean(1) / others_H).tolist()
        self._rows[call.layer] = row

    def tables(self) -> dict[str, list[list[float]]]:
        """`first`, and `null` if it has a value: by layer and head, [L][H]."""
        rows = [self._rows[layer] for layer in sorted(self._rows)]
        return {name: [row[name] for row in rows] for name in rows[0]}
