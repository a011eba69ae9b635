"""GPTQ: round weights so that a layer's output moves least, not its weights (2210.17323).

Columns are rounded one after the other; what a column's rounding did to the output is made good in
the columns still to come, weighted by the inputs' second moments H = 2 X^T X.

Axes: O out, I in; N tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.quantization.grids import Grid, Levels, snap, to_blocks
from oasis_attn.quantization.linearize import expert_of
from oasis_attn.quantization.quantizers import find_levels

DAMPENING = 0.01
"""Added to each entry of H's diagonal, as a share of itself.

The paper adds a share of the diagonal's mean, which where a few channels dwarf the others makes of
these others rounding to nearest.
"""

_BLOCK = 128  # columns whose corrections to all later ones are made at once


@torch.no_grad()
def gptq(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    names: Collection[str],
    grid: Grid,
    *,
    estimator: str = "minmax",
) -> dict[str, Tensor]:
    """Weights on `grid`, `[O, I]` of each linear's own dtype, by its name; `model` stays as it is.

    All tokens go through the model once, together: each layer's weight is rounded when its input
    arrives, and passes on what it computes with rounded weights, so that later layers make good
    what earlier ones lost.  The grid lies where `find_levels` puts it over the unrounded weight.
    An expert's input is the tokens routed to it; one that gets none is left out of the result.

    Args:
        model: a decoder whose linears may have input transforms, as forward pre-hooks.
        batches: token ids, int64 [B, T], all of one length T.
        names: of the linears to round.
        estimator: see `find_levels`.

    Raises:
        UserError: batches of several lengths, a linear that no token reached though it is no
            expert's, or inputs that are not finite.
    """
    lengths = {tokens_BT.shape[1] for tokens_BT in batches}
    if len(lengths) != 1:
        raise UserError(f"calibration: batches of lengths {sorted(lengths)}; GPTQ needs one length")
    tokens_BT = torch.cat(list(batches)).to(model.device)
    layers = {name: model.get_submodule(name) for name in names}
    head = model.get_output_embeddings()
    rounder = _Rounder(grid, estimator)
    with ExitStack() as stack, suppress(_Done):
        for name, layer in layers.items():
            stack.callback(setattr, layer, "weight", layer.weight)
            stack.callback(rounder.listen(name, layer, last=layer is head).remove)
        run = model if any(layer is head for layer in layers.values()) else model.base_model
        run(input_ids=tokens_BT, use_cache=False)
    for name in layers:
        if name not in rounder.weights and expert_of(model, name) is None:
            raise UserError(f"{name}: no calibration token reached it")
    return rounder.weights


class _Done(Exception):
    """The head is rounded; its logits, of all tokens at once, are not wanted."""


class _Rounder:
    """Rounds each layer it listens to as its first input arrives."""

    def __init__(self, grid: Grid, estimator: str) -> None:
        self.grid, self.estimator = grid, estimator
        self.weights: dict[str, Tensor] = {}
        self._factored: tuple[Tensor | None, Tensor] = None, torch.empty(0)

    def listen(self, name: str, layer: nn.Module, *, last: bool) -> RemovableHandle:
        def hook(layer: nn.Module, inputs: tuple[Tensor]) -> None:
            if name in self.weights:
                return
            weight_OI = cast(Tensor, layer.weight)
            levels = find_levels(
                weight_OI, self.grid, estimator=self.estimator, site=f"{name}.weight"
            )
            factor_II = self._factor(inputs[0], name)
            self.weights[name] = round_weight(weight_OI, factor_II, levels, self.grid)
            layer.weight = nn.Parameter(self.weights[name], requires_grad=False)
            if last:
                raise _Done

        return layer.register_forward_pre_hook(hook)

    def _factor(self, x: Tensor, name: str) -> Tensor:
        """`inverse_factor`, found once for all layers that read the same tensor."""
        if self._factored[0] is not x:
            if not x.isfinite().all():
                raise UserError(f"{name}: its input holds NaN or infinity")
            self._factored = x, inverse_factor(x.flatten(0, -2))
        return self._factored[1]


def inverse_factor(x_NI: Tensor) -> Tensor:
    """Upper Cholesky factor of H^-1, `[I, I]` float64, of the dampened H (paper, section 3)."""
    x_NI = x_NI.to(torch.promote_types(x_NI.dtype, torch.float32))
    H_II = (2 * x_NI.T @ x_NI).double()
    diagonal_I = H_II.diagonal()
    diagonal_I.mul_(1 + DAMPENING)
    diagonal_I[diagonal_I == 0] = 1.0  # a channel that is always 0: to the nearest level
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(H_II))
    return torch.linalg.cholesky(inverse_II, upper=True)


def round_weight(weight_OI: Tensor, factor_II: Tensor, levels: Levels, grid: Grid) -> Tensor:
    """`weight_OI` on its levels, columns in their order (paper, algorithm 1)."""
    blocks = to_blocks(weight_OI, grid)
    scale, lowest, highest = (
        part.double().expand(blocks.shape).reshape(weight_OI.shape).T for part in levels
    )
    left_IO = weight_OI.double().T.contiguous()  # what is still to be rounded
    for start in range(0, len(left_IO), _BLOCK):
        stop = min(start + _BLOCK, len(left_IO))
        errors = torch.empty_like(left_IO[start:stop])
        for column in range(start, stop):
            level = (left_IO[column] / scale[column]).round_()
            rounded = level.clamp_(lowest[column], highest[column]).mul_(scale[column])
            error = (left_IO[column] - rounded) / factor_II[column, column]
            left_IO[column] = rounded
            left_IO[column + 1 : stop].addr_(factor_II[column, column + 1 : stop], error, alpha=-1)
            errors[column - start] = error
        left_IO[stop:].addmm_(factor_II[start:stop, stop:].T, errors, alpha=-1)
    on_grid = snap(to_blocks(left_IO.T.to(levels.scale.dtype), grid), levels)
    return on_grid.reshape(weight_OI.shape).to(weight_OI.dtype)
