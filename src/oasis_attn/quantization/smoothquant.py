"""SmoothQuant: move the magnitude of activation channels into the weights (2211.10438).

    x W^T = (x / s) (W s)^T,        s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)        (equation 4)

The division by s is folded into the module that produces x: the gain of a norm, or the rows of a
linear layer.  If neither is known, the division runs at inference time.

Axes: D input channels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.decoder_map import decoder_map
from oasis_attn.quantization.calibration import run_batch
from oasis_attn.quantization.sublayers import Source, Sublayer, gain_of, like, sublayers_of
from oasis_attn.quantization.targets import linear_layers
from oasis_attn.quantization.transforms import Scale

_MIN_SCALE = 1e-5  # as in the authors' code


@torch.no_grad()
def smooth(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    *,
    alpha: float,
    layers: Collection[str] | None = None,
) -> dict[str, nn.Module]:
    """Smooth the inputs of `linear_layers(model)` in place; the model computes the same function.

    Parameters are replaced, not overwritten, so that models which share them do not change.  Linear
    layers that read the same norm share one s, and so do the query heads of one value head.  Each
    expert has its own s, from the tokens routed to it.  Channels that are 0 for all calibration
    tokens, or in all weights, have s = 1.

    Args:
        model: a decoder of transformers or of this library.
        batches: token ids, int64 [B, T], or embeddings [B, T, D].
        alpha: migration strength; 0 leaves the activations unchanged, 1 makes all channels equally
            large.
        layers: the names of the layers whose input may be divided at inference time; default: all.

    Returns:
        The divisions that could not be folded, by linear layer; they must run on its input.

    Raises:
        UserError: alpha outside 0 .. 1, or activations that are not finite.
    """
    if isinstance(alpha, bool) or not 0 <= alpha <= 1:
        raise UserError(f"smooth_alpha: {alpha!r} is not a number from 0 to 1")
    linears = linear_layers(model)
    largest = _largest_inputs(model, batches, linears)
    folded: set[str] = set()
    for sublayer in _foldable(model):
        # The writer first: it changes rows of a reader, and the readers' s depends on them.
        if sublayer.source is not None:
            _smooth_writer(sublayer.writer, sublayer.source, largest, alpha)
            folded.update(sublayer.writer)
        if _smooth_readers(sublayer, largest, alpha):
            folded.update(sublayer.readers)

    transforms: dict[str, nn.Module] = {}
    for name, linear in linears.items():
        if name not in folded and (layers is None or name in layers):
            scale_D = _scale(largest[name], _columns([linear]), alpha)
            if not scale_D.eq(1).all():
                _multiply(linear, scale_D)
                transforms[name] = Scale(scale_D.reciprocal().to(linear.weight.dtype))
    return transforms


def _largest_inputs(
    model: PreTrainedModel, batches: Iterable[Tensor], linears: dict[str, nn.Linear]
) -> dict[str, Tensor]:
    """max|x| per channel of each linear layer's input, `[D]` float64; 0 if no token reached it."""
    largest: dict[str, Tensor] = {}

    def observe(name: str, linear: nn.Linear) -> None:
        largest[name] = linear.weight.new_zeros(linear.in_features)

        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            if inputs[0].numel():
                batch_D = inputs[0].abs().flatten(0, -2).amax(0)
                largest[name] = torch.maximum(largest[name], batch_D)

        stack.callback(linear.register_forward_pre_hook(hook).remove)

    with ExitStack() as stack:
        for name, linear in linears.items():
            observe(name, linear)
        for batch in batches:
            run_batch(model.base_model, batch)
    for name, largest_D in largest.items():
        if not largest_D.isfinite().all():
            raise UserError(f"{name}: its input holds NaN or infinity")
    return {name: largest_D.double() for name, largest_D in largest.items()}


def _foldable(model: PreTrainedModel) -> list[Sublayer]:
    """The sublayers of which all parameters are known; none if the family has no row."""
    text = model.config.get_text_config(decoder=True)
    decoder = decoder_map(model)
    if not decoder.has_row:
        return []
    sublayers = sublayers_of(decoder, text.num_attention_heads)
    return [sublayer for sublayer in sublayers if sublayer.unknown_parameter is None]


def _smooth_writer(
    writer: dict[str, nn.Linear], source: Source, largest: dict[str, Tensor], alpha: float
) -> None:
    [(name, linear)] = writer.items()
    rows, start, groups, repeats, width, _, null = source
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
    if null is not None:
        value_HMW: Tensor = null.null_value  # type: ignore[assignment]
        scale_H1W = scale_GW.repeat_interleave(repeats, 0)[:, None]
        null.null_value = like(value_HMW, value_HMW.double() / scale_H1W)


def _smooth_readers(sublayer: Sublayer, largest: dict[str, Tensor], alpha: float) -> bool:
    """Fold the division into the norm; returns False if the norm has no gain."""
    norm, targets = sublayer.norm, [name for name in sublayer.readers if name in largest]
    weight = getattr(norm, "weight", None)
    if norm is None or weight is None or not targets:
        return False
    gain = gain_of(norm, len(weight), weight.device)
    if gain is None:
        return False
    gain_D, neutral = gain
    columns_D = _columns([sublayer.readers[name] for name in targets])
    scale_D = _scale(largest[targets[0]], columns_D, alpha)
    for linear in sublayer.readers.values():
        _multiply(linear, scale_D)
    norm.weight = like(weight, gain_D.double() / scale_D - (1 - neutral))
    return True


def _scale(largest_D: Tensor, columns_D: Tensor, alpha: float) -> Tensor:
    """s of equation 4, float64."""
    scale_D = (largest_D**alpha / columns_D ** (1 - alpha)).clamp(min=_MIN_SCALE)
    return torch.where((largest_D > 0) & (columns_D > 0), scale_D, 1.0)


def _columns(linears: list[nn.Linear]) -> Tensor:
    """max|W| per input channel over all of `linears`, `[D]` float64."""
    return torch.stack([linear.weight.abs().amax(0).double() for linear in linears]).amax(0)


def _multiply(linear: nn.Linear, scale_D: Tensor) -> None:
    linear.weight = like(linear.weight, linear.weight.double() * scale_D)
