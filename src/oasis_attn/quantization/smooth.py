"""SmoothQuant: hand the size of an activation's channels over to the weights (2211.10438).

    x W^T = (x / s) (W s)^T,        s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)        (equation 4)

Division by s is folded into what makes x: a norm's gain, or the rows that x is linear in.  Where
neither is known, it is done as the model runs.

Axes: D in.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.families import FAMILIES
from oasis_attn.quantization.branches import Branch, Source, branches, gain_of, like
from oasis_attn.quantization.sites import linear_layers
from oasis_attn.quantization.transforms import Scale

_LEAST = 1e-5  # of s, as in the authors' code


@torch.no_grad()
def smooth(
    model: PreTrainedModel, batches: Iterable[Tensor], *, alpha: float
) -> dict[str, nn.Module]:
    """Smooth the inputs of `linear_layers(model)` in place, without a change of the function.

    Parameters are replaced, never written into: whoever shares them keeps his.  Linears that read
    one norm share one s, and so do the query heads of one value head.  Each expert has its own s,
    from the tokens routed to it.  A channel that is 0 on all calibration tokens, or in all weights,
    has s = 1.

    Args:
        model: a decoder of ours or any other.
        batches: token ids, int64 [B, T].
        alpha: 0 leaves activations uneven, 1 makes all their channels equally large.

    Returns:
        by linear, the division that must run on its input because it could not be folded.

    Raises:
        UserError: alpha outside 0 .. 1, or activations that are not finite.
    """
    if isinstance(alpha, bool) or not 0 <= alpha <= 1:
        raise UserError(f"smooth_alpha: {alpha!r} is not a number from 0 to 1")
    linears = linear_layers(model)
    largest = _largest_inputs(model, batches, linears)
    folded: set[str] = set()
    for sublayer in _foldable(model):
        # The writer first: the rows that it changes are what the readers' s should see.
        if sublayer.source is not None:
            _smooth_writer(sublayer.writer, sublayer.source, largest, alpha)
            folded.update(sublayer.writer)
        if _smooth_readers(sublayer, largest, alpha):
            folded.update(sublayer.readers)

    transforms: dict[str, nn.Module] = {}
    for name, linear in linears.items():
        if name not in folded:
            scale_D = _scale(largest[name], _columns([linear]), alpha)
            if not scale_D.eq(1).all():
                _multiply(linear, scale_D)
                transforms[name] = Scale(scale_D.reciprocal().to(linear.weight.dtype))
    return transforms


def _largest_inputs(
    model: PreTrainedModel, batches: Iterable[Tensor], linears: dict[str, nn.Linear]
) -> dict[str, Tensor]:
    """max|x| per channel of each linear's input, `[D]` float64; 0 where no token came."""
    largest: dict[str, Tensor] = {}

    def listen(name: str, linear: nn.Linear) -> None:
        largest[name] = linear.weight.new_zeros(linear.in_features)

        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            if inputs[0].numel():
                seen_D = inputs[0].abs().flatten(0, -2).amax(0)
                largest[name] = torch.maximum(largest[name], seen_D)

        stack.callback(linear.register_forward_pre_hook(hook).remove)

    with ExitStack() as stack:
        for name, linear in linears.items():
            listen(name, linear)
        for tokens_BT in batches:
            model.base_model(input_ids=tokens_BT.to(model.device), use_cache=False)
    for name, largest_D in largest.items():
        if not largest_D.isfinite().all():
            raise UserError(f"{name}: its input holds NaN or infinity")
    return {name: largest_D.double() for name, largest_D in largest.items()}


def _foldable(model: PreTrainedModel) -> list[Branch]:
    if model.config.get_text_config().model_type not in FAMILIES:
        return []
    return [sublayer for sublayer in branches(model) if sublayer.stranger is None]


def _smooth_writer(
    writer: dict[str, nn.Linear], source: Source, largest: dict[str, Tensor], alpha: float
) -> None:
    [(name, linear)] = writer.items()
    rows, start, groups, repeats, width = source
    heads = (groups, repeats, width)
    inputs_GW, columns_GW = (
        of_D.view(heads).amax(1) for of_D in (largest[name], _columns([linear]))
    )
    scale_GW = _scale(inputs_GW, columns_GW, alpha)
    _multiply(linear, scale_GW[:, None].expand(heads).flatten())
    for name in ("weight", "bias"):
        parameter = getattr(rows, name)
        if parameter is not None:
            divided = parameter.to(torch.float64, copy=True)
            shape = (-1,) + (1,) * (divided.dim() - 1)
            divided[start : start + groups * width] /= scale_GW.view(shape)
            setattr(rows, name, like(parameter, divided))


def _smooth_readers(sublayer: Branch, largest: dict[str, Tensor], alpha: float) -> bool:
    """Whether the norm had a gain to take the division up."""
    norm, sites = sublayer.norm, [name for name in sublayer.readers if name in largest]
    weight = getattr(norm, "weight", None)
    if norm is None or weight is None or not sites:
        return False
    gain = gain_of(norm, len(weight))
    if gain is None:
        return False
    gain_D, neutral = gain
    columns_D = _columns([sublayer.readers[name] for name in sites])
    scale_D = _scale(largest[sites[0]], columns_D, alpha)
    for linear in sublayer.readers.values():
        _multiply(linear, scale_D)
    norm.weight = like(weight, gain_D.double() / scale_D - (1 - neutral))
    return True


def _scale(largest_D: Tensor, columns_D: Tensor, alpha: float) -> Tensor:
    """s, float64."""
    scale_D = (largest_D**alpha / columns_D ** (1 - alpha)).clamp(min=_LEAST)
    return torch.where((largest_D > 0) & (columns_D > 0), scale_D, 1.0)


def _columns(linears: list[nn.Linear]) -> Tensor:
    """max|W| per input channel, over all of `linears`: `[D]` float64."""
    return torch.stack([linear.weight.abs().amax(0).double() for linear in linears]).amax(0)


def _multiply(linear: nn.Linear, scale_D: Tensor) -> None:
    linear.weight = like(linear.weight, linear.weight.double() * scale_D)
