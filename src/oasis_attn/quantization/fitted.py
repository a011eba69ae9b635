"""Transform the inputs of linear layers by the matrices with the smallest error of quantization.

An input x and a weight W become x T and W T^-T, whose product is the same.  If all entries of a
token share a scale, and all entries of a row of the weight, the error of the output is proportional
to tr(T^T S T) tr(T^-1 M T^-T), where S is the mean of x x^T and M = W^T W.  It is smallest if

    T = L^-T U E^(1/4) R        with S = L L^T, L^T M L = U E U^T and a Hadamard matrix R,

which gives input and weight the same second moments R^T E^(1/2) R, spread evenly over all channels
(WUSH, 2512.00956, equation 12; there T is a matrix per group of channels that share a scale).

Axes: N tokens, O out, I in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.quantization.calibration import one_batch, run_batch
from oasis_attn.quantization.sublayers import like
from oasis_attn.quantization.targets import linear_layers
from oasis_attn.quantization.transforms import Dense, Rotation

DAMPENING = 0.01
"""The fraction of the mean of their diagonal that is added to the diagonal of S and M."""


@torch.no_grad()
def fit_inputs(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    *,
    seed: int,
    layers: Collection[str] | None = None,
) -> dict[str, nn.Module]:
    """Fit the transforms of the inputs of `linear_layers(model)`, whose weights are adapted.

    All tokens pass through the model once, in one batch; each layer is fitted when its input
    arrives.  The model computes the same function.  Parameters are replaced, not overwritten.

    Args:
        model: a decoder of transformers or of this library.
        batches: token ids, int64 [B, T], or embeddings [B, T, D], all of one length T.
        seed: random seed of the signs of the Hadamard matrices, which do not depend on `layers`.
        layers: the names of the layers whose inputs are transformed; default: all.

    Returns:
        The transforms by linear layer; they must run on its input.

    Raises:
        UserError: batches of different lengths, or inputs that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    linears = linear_layers(model)
    rotations = {
        name: Rotation(layer.in_features, generator=generator) for name, layer in linears.items()
    }
    if layers is not None:
        linears = {name: layer for name, layer in linears.items() if name in layers}
    fitted: dict[str, nn.Module] = {}
    latest: tuple[Tensor | None, Tensor] = None, torch.empty(0)

    def fit(name: str, layer: nn.Linear, moments_II: Tensor) -> None:
        rotation = rotations[name].to(moments_II.device)
        transform_II, weight_OI = fit_transform(moments_II, layer.weight, rotation)
        fitted[name] = Dense(transform_II.to(layer.weight.dtype))
        layer.weight = like(layer.weight, weight_OI)

    def register(name: str, layer: nn.Linear) -> None:
        def hook(layer: nn.Linear, inputs: tuple[Tensor]) -> Tensor:
            nonlocal latest
            (x,) = inputs
            if name not in fitted:
                if latest[0] is not x:  # several layers can read the same tensor
                    latest = x, directions(x.flatten(0, -2), name)
                fit(name, layer, latest[1])
            return fitted[name](x)

        stack.callback(layer.register_forward_pre_hook(hook).remove)

    with ExitStack() as stack:
        for name, layer in linears.items():
            register(name, layer)
        run_batch(model.base_model, one_batch(batches))
    for name, layer in linears.items():
        if name not in fitted:  # experts that no token reached
            eye_II = torch.eye(layer.in_features, device=layer.weight.device, dtype=torch.float64)
            fit(name, layer, eye_II)
    return fitted


def directions(x_NI: Tensor, name: str) -> Tensor:
    """The second moments S of tokens that are scaled to norm 1, `[I, I]` float64.

    A range per token has an error that is proportional to the norm of the token.  With their norms,
    S would depend on the few tokens with massive activations only.  `UserError` on NaN and infinity
    calls the tokens `name`.
    """
    if not x_NI.isfinite().all():
        raise UserError(f"{name}: its input holds NaN or infinity")
    x_NI = x_NI.to(torch.promote_types(x_NI.dtype, torch.float32))
    unit_NI = nn.functional.normalize(x_NI, dim=-1)
    return (unit_NI.T @ unit_NI).double()


def fit_transform(
    moments_II: Tensor, weight_OI: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """T `[I, I]` and W T^-T `[O, I]`, float64, for the second moments of the input."""
    weight_OI = weight_OI.double()
    factor_II = torch.linalg.cholesky(dampened(moments_II))
    energy_I, basis_II = torch.linalg.eigh(
        factor_II.T @ dampened(weight_OI.T @ weight_OI) @ factor_II
    )
    scale_I = energy_I**0.25
    transform_II = torch.linalg.solve_triangular(factor_II.T, basis_II * scale_I, upper=True)
    return rotation(transform_II), rotation(weight_OI @ factor_II @ (basis_II / scale_I))


def dampened(moments_II: Tensor) -> Tensor:
    """Second moments that are larger than zero in every direction."""
    mean = moments_II.diagonal().mean()
    added = torch.where(mean > 0, DAMPENING * mean, 1.0)  # 1 if all moments are 0
    return moments_II + added * torch.eye(len(moments_II)).to(moments_II)
