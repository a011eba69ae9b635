"""GPTQ: round weights so that the outputs of layers change as little as possible (2210.17323).

Columns are rounded one after the other.  The later columns compensate for the output error of each
rounded column, weighted by the second moments of the inputs H = 2 X^T X.  The columns with the
largest expected error, H_jj times the mean square of the scales, come first, when most columns can
still compensate.  With one scale per row, this is the activation order of the authors' code.

Axes: O out, I in; N tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.quantization.calibration import one_batch, run_batch
from oasis_attn.quantization.linear import weight_qparams
from oasis_attn.quantization.linearize import expert_of
from oasis_attn.quantization.primitives import QParams, fake_quantize, round_codes, to_blocks
from oasis_attn.quantization.spec import QuantSpec

DAMPENING = 0.01
"""Each diagonal entry of H is increased by this fraction of itself.

The paper adds a fraction of the diagonal's mean.  If a few channels are much larger than the
others, that amounts to rounding the other channels to nearest.
"""

_BLOCK = 128  # number of columns whose corrections are applied to all later columns in one product


@torch.no_grad()
def gptq(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    names: Collection[str],
    spec: QuantSpec,
    *,
    observer: str = "minmax",
    fused_scales: bool = False,
) -> dict[str, Tensor]:
    """Round the weights of linear layers; `model` does not change.

    All tokens pass through the model once, in one batch.  Each layer's weight is rounded when its
    input arrives, and the layer then computes with the rounded weight, so that later layers
    compensate for errors of earlier ones.  `weight_qparams` computes the quantization parameters
    from the original weights.  The input of an expert is the tokens routed to it.

    Args:
        model: a decoder; its linear layers may have input transforms as forward pre-hooks.
        batches: token ids, int64 [B, T], or embeddings [B, T, D], all of one length T.
        names: names of the linear layers.
        spec: the format of the weights.
        observer, fused_scales: see `weight_qparams`.

    Returns:
        The rounded weights `[O, I]` by layer name, each in the dtype of its layer.  Experts that
        got no tokens are missing.

    Raises:
        UserError: batches of different lengths, a layer other than an expert that no token reached,
            or inputs that are not finite.
    """
    batch = one_batch(batches)
    layers = {name: cast(nn.Linear, model.get_submodule(name)) for name in names}
    head = model.get_output_embeddings()
    qparams = weight_qparams(layers, spec, observer=observer, fused_scales=fused_scales)
    rounder = _Rounder(spec, qparams)
    with ExitStack() as stack, suppress(_Done):
        for name, layer in layers.items():
            stack.callback(setattr, layer, "weight", layer.weight)
            stack.callback(rounder.register(name, layer, last=layer is head).remove)
        run = model if any(layer is head for layer in layers.values()) else model.base_model
        run_batch(run, batch)
    for name in layers:
        if name not in rounder.weights and expert_of(model, name) is None:
            raise UserError(f"{name}: no calibration token reached it")
    return rounder.weights


class _Done(Exception):
    """Stops the forward pass after the head is rounded, because the logits are not needed."""


class _Rounder:
    """Rounds the weight of each registered layer when its first input arrives."""

    def __init__(self, spec: QuantSpec, qparams: Mapping[str, QParams]) -> None:
        self.spec, self.qparams = spec, qparams
        self.weights: dict[str, Tensor] = {}
        self._moments: tuple[Tensor | None, Tensor] = None, torch.empty(0)

    def register(self, name: str, layer: nn.Module, *, last: bool) -> RemovableHandle:
        def hook(layer: nn.Linear, inputs: tuple[Tensor]) -> None:
            if name in self.weights:
                return
            weight_OI, moments_II = layer.weight, self._second_moments(inputs[0], name)
            self.weights[name] = round_weight(weight_OI, moments_II, self.qparams[name], self.spec)
            layer.weight = nn.Parameter(self.weights[name], requires_grad=False)
            if last:
                raise _Done

        return layer.register_forward_pre_hook(hook)

    def _second_moments(self, x: Tensor, name: str) -> Tensor:
        """`second_moments` of `x`, computed once for all layers that read the same tensor."""
        if self._moments[0] is not x:
            if not x.isfinite().all():
                raise UserError(f"{name}: its input holds NaN or infinity")
            self._moments = x, second_moments(x.flatten(0, -2))
        return self._moments[1]


def second_moments(x_NI: Tensor) -> Tensor:
    """Dampened H, `[I, I]` float64 (paper, section 3)."""
    x_NI = x_NI.to(torch.promote_types(x_NI.dtype, torch.float32))
    moments_II = (2 * x_NI.T @ x_NI).double()
    diagonal_I = moments_II.diagonal()
    diagonal_I.mul_(1 + DAMPENING)
    diagonal_I[diagonal_I == 0] = 1.0  # channels that are always 0 are rounded to nearest
    return moments_II


def round_weight(
    weight_OI: Tensor, moments_II: Tensor, qparams: QParams, spec: QuantSpec
) -> Tensor:
    """Round `weight_OI` column by column (paper, algorithm 1).

    `moments_II` are the `second_moments` of the input.
    """
    blocks = to_blocks(weight_OI, spec)
    scale, quant_min, quant_max = (
        part.double().expand(blocks.shape).reshape(weight_OI.shape).T for part in qparams
    )
    expected_I = moments_II.diagonal() * scale.square().mean(1)
    order_I = expected_I.argsort(descending=True, stable=True)
    scale, quant_min, quant_max = scale[order_I], quant_min[order_I], quant_max[order_I]
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(moments_II[order_I][:, order_I]))
    factor_II = torch.linalg.cholesky(inverse_II, upper=True)
    left_IO = weight_OI.double().T[order_I]  # columns from `start` on are not rounded yet
    for start in range(0, len(left_IO), _BLOCK):
        stop = min(start + _BLOCK, len(left_IO))
        errors = torch.empty_like(left_IO[start:stop])
        for column in range(start, stop):
            code = round_codes(left_IO[column] / scale[column], spec.element_type)
            rounded = code.clamp_(quant_min[column], quant_max[column]).mul_(scale[column])
            error = (left_IO[column] - rounded) / factor_II[column, column]
            left_IO[column] = rounded
            left_IO[column + 1 : stop].addr_(factor_II[column, column + 1 : stop], error, alpha=-1)
            errors[column - start] = error
        left_IO[stop:].addmm_(factor_II[start:stop, stop:].T, errors, alpha=-1)
    rounded_OI = left_IO[order_I.argsort()].T.to(qparams.scale.dtype)
    on_grid = fake_quantize(to_blocks(rounded_OI, spec), qparams, spec.element_type)
    return on_grid.reshape(weight_OI.shape).to(weight_OI.dtype)
