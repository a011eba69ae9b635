"""Rotate activations so that outliers spread over all channels; the function stays the same.

`rotate_residual` rotates the residual stream (QuaRot, 2404.00456).  Without its gain, an RMSNorm
commutes with a rotation.  The gains therefore move into the linear layers that read the norms; then
the weights of the embedding, of the layers that read or write the residual stream and of the head
are multiplied by the rotation or its inverse.  Only the inputs of the writers (`o_proj`,
`down_proj`) are rotated at inference time.

`rotate_weights` does nothing at inference time: it rotates the residual stream and the value heads
(R1 and R2 of SpinQuant, 2405.16406), so that the inputs of `down_proj` keep their outliers.

`rotate_inputs` rotates the input of every linear layer at inference time.  It is slower, works for
any family, and is more accurate at 4 bits, because channels with a small gain stay small.  With a
group size, each group of channels is rotated by itself, so that an outlier stays in its group.

Axes: D width, R routers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.decoder_map import DecoderMap, decoder_map
from oasis_attn.modeling.depth_cache import DepthRouter
from oasis_attn.modeling.extensions import BRANCH_NORMS
from oasis_attn.modeling.families import family_of
from oasis_attn.modeling.official import KeyProjection, OfficialRouter
from oasis_attn.quantization.sublayers import Source, Sublayer, gain_of, like, sublayers_of
from oasis_attn.quantization.targets import linear_layers
from oasis_attn.quantization.transforms import Rotation

_ROWS = 8192  # rows rotated at once: a float64 copy of a whole embedding would be large


@torch.no_grad()
def rotate_residual(
    model: PreTrainedModel, *, seed: int, layers: Collection[str] | None = None
) -> dict[str, nn.Module]:
    """Rotate the residual stream of `model`, and the inputs of its writers, in place.

    Parameters are replaced, not overwritten, so that models which share them do not change.  A tied
    head is untied.  With depth routing, all sources and the queries of the routers are rotated by
    the same matrix.

    Args:
        model: a decoder with a head, of this library or of a family in `modeling.families`.
        seed: random seed of the rotations' signs, which do not depend on `layers`.
        layers: the names of the writers whose inputs are rotated; default: all.

    Returns:
        The rotations by writer; they must run on its input, and its weight contains the inverse.

    Raises:
        UserError: the rotation would change what a model of this family computes: it has norms
            between sublayers and residual stream, norms other than RMSNorm, experts, unknown
            parameters, or a registered branch norm.
    """
    generator = torch.Generator().manual_seed(seed)
    sublayers = _rotate_stream(model, generator)
    writers = {name: linear for sublayer in sublayers for name, linear in sublayer.writer.items()}
    return _rotate_inputs(writers, generator, layers)


@torch.no_grad()
def rotate_weights(model: PreTrainedModel, *, seed: int) -> None:
    """Rotate the residual stream and the value heads of `model` in place, by its weights alone.

    The values of a layer are not rotated if each entry of them gets its own gate, or if they are
    not the output of a `v_proj` or `qkv_proj`, as in latent attention.  Everything else is as in
    `rotate_residual`, which has the same residual stream for the same seed.

    Args:
        model: as in `rotate_residual`.
        seed: random seed of the rotations' signs.

    Raises:
        UserError: as `rotate_residual`.
    """
    generator = torch.Generator().manual_seed(seed)
    for sublayer in _rotate_stream(model, generator):
        source = sublayer.source
        if source is not None and not source.gated:
            [writer] = sublayer.writer.values()
            _rotate_values(source, writer, generator)


def _rotate_values(source: Source, writer: nn.Linear, generator: torch.Generator) -> None:
    """Rotate each value head by the same matrix, and the input of `writer` back."""
    rotation = _rotation(source.linear.weight, generator, source.width)
    rows = slice(source.start, source.start + source.groups * source.width)
    for name in ("weight", "bias"):
        parameter = getattr(source.linear, name)
        if parameter is not None:
            rotated = parameter.to(torch.float64, copy=True)
            rotated[rows] = rotation(rotated[rows].movedim(0, -1)).movedim(-1, 0)
            setattr(source.linear, name, like(parameter, rotated))
    if source.null is not None:
        value_HMW: Tensor = source.null.null_value  # type: ignore[assignment]
        source.null.null_value = like(value_HMW, rotation(value_HMW.double()))
    _rotate_weight(writer, rotation)


def _rotate_stream(model: PreTrainedModel, generator: torch.Generator) -> list[Sublayer]:
    """Rotate the residual stream of `model`; return its sublayers."""
    _check_branch_norm(model)
    text = model.config.get_text_config(decoder=True)
    family_of(text)  # raises if it has no row
    decoder = decoder_map(model)
    sublayers = sublayers_of(decoder, text.num_attention_heads)
    embedding, final, head = _ends(model, decoder)
    norms = [(sublayer.norm, sublayer.readers) for sublayer in sublayers]
    norms.append((final, {"head": head}))
    gains = _checked_gains(model, decoder, sublayers, norms, embedding.weight)

    stream = _rotation(embedding.weight, generator)
    _rotate_weight(embedding, stream)
    for (norm, readers), (gain_D, neutral) in zip(norms, gains, strict=True):
        for linear in readers.values():
            _rotate_weight(linear, stream, gain_D)
        weight = getattr(norm, "weight", None)
        if norm is not None and weight is not None:
            norm.weight = like(weight, torch.full_like(gain_D, neutral))
    for sublayer in sublayers:
        for linear in sublayer.writer.values():
            linear.weight = like(linear.weight, stream(linear.weight.double().T).T)
            if linear.bias is not None:
                linear.bias = like(linear.bias, stream(linear.bias.double()))
    for module in model.modules():
        _rotate_router(module, stream)
    _untie(model)
    return sublayers


@torch.no_grad()
def rotate_inputs(
    model: PreTrainedModel,
    *,
    seed: int,
    group_size: int | None = None,
    layers: Collection[str] | None = None,
) -> dict[str, nn.Module]:
    """Rotate the inputs of `linear_layers(model)` in place.

    Parameters are replaced, not overwritten.

    Args:
        model: a decoder of transformers or of this library.
        seed: random seed of the rotations' signs, which do not depend on `layers`.
        group_size: neighboring channels that are rotated together, as formats with a scale per
            group need it (2509.23202); default: all channels of an input.
            Layers with another number of inputs than a multiple of it stay as they are: a format
            with these groups cannot quantize them.
        layers: the names of those whose inputs are rotated; default: all.

    Returns:
        The rotations by linear layer; they must run on its input, and its weight contains the
        inverse.
    """
    linears = {
        name: linear
        for name, linear in linear_layers(model).items()
        if linear.in_features % (group_size or 1) == 0
    }
    return _rotate_inputs(linears, torch.Generator().manual_seed(seed), layers, group_size)


def _rotate_inputs(
    linears: dict[str, nn.Linear],
    generator: torch.Generator,
    layers: Collection[str] | None,
    group_size: int | None = None,
) -> dict[str, nn.Module]:
    rotations: dict[str, nn.Module] = {}
    for name, linear in linears.items():
        rotation = _rotation(linear.weight, generator, group_size)
        if layers is None or name in layers:
            _rotate_weight(linear, rotation)
            rotations[name] = rotation.to(linear.weight.dtype)
    return rotations


def _ends(model: PreTrainedModel, decoder: DecoderMap) -> tuple[nn.Embedding, nn.Module, nn.Linear]:
    """The embedding, the final norm and the head."""
    embedding, norm, head = (
        part and part.module for part in (decoder.embedding, decoder.final_norm, decoder.head)
    )
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear) or norm is None:
        raise _refusal(model, "its embedding, its final norm or its linear head was not found")
    return embedding, norm, head


def _checked_gains(
    model: PreTrainedModel,
    decoder: DecoderMap,
    sublayers: list[Sublayer],
    norms: list[tuple[nn.Module | None, dict[str, nn.Linear]]],
    embedding_VD: Tensor,
) -> list[tuple[Tensor, float]]:
    """The gain and the neutral weight of each norm; `UserError` if the model cannot be rotated."""
    for layer in decoder.layers:
        for sublayer in (layer.attention, layer.mlp):
            if sublayer is None or sublayer.post_norm or not sublayer.pre_norm:
                raise _refusal(model, "its norms stand between sublayers and residual stream")
    unknown = [sublayer.unknown_parameter for sublayer in sublayers]
    for name in (*unknown, *decoder.unknown):
        if name is not None and ".depth." not in name:
            raise _refusal(model, f"it is unknown how {name} uses the residual stream")
    gains = []
    for norm, _ in norms:
        assert norm is not None
        gain = gain_of(norm, embedding_VD.shape[1], embedding_VD.device)
        if gain is None:
            raise _refusal(model, f"its {type(norm).__name__} is not an RMSNorm")
        gains.append(gain)
    return gains


def _check_branch_norm(model: PreTrainedModel) -> None:
    """Raise `UserError` unless the branch norm of `model` commutes with every rotation."""
    name = getattr(model.config, "branch_norm", "none")
    if name != "none" and name not in BRANCH_NORMS.own:
        raise UserError(
            f"rotation: the residual stream cannot be rotated with branch_norm {name!r}, a"
            " registered function that may not commute with a rotation; use 'inputs'"
        )


def _refusal(model: PreTrainedModel, reason: str) -> UserError:
    kind = model.config.get_text_config().model_type
    return UserError(
        f"rotation: family {kind!r} cannot be rotated: {reason}; use 'inputs', which rotates at run"
        " time and works for any family"
    )


def _rotation(
    weight: Tensor, generator: torch.Generator, group_size: int | None = None
) -> Rotation:
    """A random rotation of the rows of `weight`, float64, on the same device."""
    return Rotation(group_size or weight.shape[1], generator=generator).to(weight.device)


def _rotate_weight(
    layer: nn.Linear | nn.Embedding | KeyProjection,
    rotation: Rotation,
    gain_D: Tensor | None = None,
) -> None:
    """Adapt a weight to an input that is rotated and no longer multiplied by the gain."""
    gain = 1.0 if gain_D is None else gain_D.double()
    rotated = [rotation(rows.double() * gain).to(rows.dtype) for rows in layer.weight.split(_ROWS)]
    layer.weight = like(layer.weight, torch.cat(rotated))


def _rotate_router(module: nn.Module, rotation: Rotation) -> None:
    if isinstance(module, DepthRouter):
        queries_RD = module.queries.double() * module.key_norm.double()
        module.queries = like(module.queries, rotation(queries_RD))
        module.key_norm = like(module.key_norm, torch.ones_like(module.key_norm))
    elif isinstance(module, OfficialRouter):
        _rotate_weight(module.q_proj, rotation)
        _rotate_weight(module.k_proj, rotation)


def _untie(model: PreTrainedModel) -> None:
    """Record in the configs that the head has its own weight."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
