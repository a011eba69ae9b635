"""Rotate activations, so that no channel stands out, without a change of the function.

Two ways, by what is rotated.  `rotate` turns the residual stream itself (QuaRot, 2404.00456): an
RMSNorm's output, but for its gain, turns with its input, so the gains move into the linears that
read the norms, and then embedding, writers, readers and head take up a rotation and its inverse.
Only the inputs of the writers (`o_proj`, `down_proj`) are rotated as the model runs.
`rotate_inputs` rotates the input of every linear as the model runs: slower, for any family, and
closer to the function at 4 bits, because channels that a norm's gain makes small stay small.

Axes: D width, R routers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.authors import AuthorsRouter, KeyProjection
from oasis_attn.modeling.families import family_of
from oasis_attn.modeling.residual import DepthRouter
from oasis_attn.quantization.branches import (
    Branch,
    branches,
    decoder_layers,
    decoder_of,
    gain_of,
    like,
)
from oasis_attn.quantization.sites import linear_layers
from oasis_attn.quantization.transforms import Rotation

_ROWS = 8192  # of a weight, turned at a time: a vocabulary in float64 would be large


@torch.no_grad()
def rotate(model: PreTrainedModel, *, seed: int) -> dict[str, nn.Module]:
    """Rotate the residual stream of `model` in place, and the inputs of its writers.

    Parameters are replaced, never written into: whoever shares them keeps his.  A tied head is
    untied.  With depth routing all sources turn alike, and the routers' queries with them.

    Args:
        model: a decoder with a head, of ours or of a family with an adapter.
        seed: of the rotations' random signs.

    Returns:
        by writer, the rotation that must run on its input; its inverse is in the weight.

    Raises:
        UserError: a family that this cannot leave unchanged, and why: norms between branches and
            residual, norms other than RMSNorm, experts, or parameters of unknown use.
    """
    sublayers = branches(model)
    embedding, final, head = _ends(model)
    norms = [(sublayer.norm, sublayer.readers) for sublayer in sublayers]
    norms.append((final, {"head": head}))
    gains = _checked_gains(model, sublayers, norms)

    generator = torch.Generator().manual_seed(seed)
    stream = _rotation(embedding.weight, generator)
    _turn(embedding, stream)
    for (norm, readers), (gain_D, neutral) in zip(norms, gains, strict=True):
        for linear in readers.values():
            _turn(linear, stream, gain_D)
        weight = getattr(norm, "weight", None)
        if norm is not None and weight is not None:
            norm.weight = like(weight, torch.full_like(gain_D, neutral))
    for sublayer in sublayers:
        for linear in sublayer.writer.values():
            linear.weight = like(linear.weight, stream(linear.weight.double().T).T)
            if linear.bias is not None:
                linear.bias = like(linear.bias, stream(linear.bias.double()))
    for module in model.modules():
        _turn_router(module, stream)
    _untie(model)
    writers = {name: linear for sublayer in sublayers for name, linear in sublayer.writer.items()}
    return _turn_inputs(writers, generator)


@torch.no_grad()
def rotate_inputs(model: PreTrainedModel, *, seed: int) -> dict[str, nn.Module]:
    """Rotate the inputs of `linear_layers(model)` in place; parameters are replaced.

    Returns:
        by linear, the rotation that must run on its input; its inverse is in the weight.
    """
    return _turn_inputs(linear_layers(model), torch.Generator().manual_seed(seed))


def _turn_inputs(linears: dict[str, nn.Linear], generator: torch.Generator) -> dict[str, nn.Module]:
    rotations: dict[str, nn.Module] = {}
    for name, linear in linears.items():
        rotation = _rotation(linear.weight, generator)
        _turn(linear, rotation)
        rotations[name] = rotation.to(linear.weight.dtype)
    return rotations


def _ends(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Module, nn.Linear]:
    """Embedding, final norm and head."""
    embedding, norm = model.get_input_embeddings(), getattr(decoder_of(model), "norm", None)
    head = model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear) or norm is None:
        raise _refusal(model, "it has no embedding, final norm and linear head that are known")
    return embedding, norm, head


def _checked_gains(
    model: PreTrainedModel,
    sublayers: list[Branch],
    norms: list[tuple[nn.Module | None, dict[str, nn.Linear]]],
) -> list[tuple[Tensor, float]]:
    """Gain and neutral weight of each norm; `UserError` where something cannot be rotated."""
    family = family_of(model.config.get_text_config())
    if family.post_attention or family.post_mlp or not (family.pre_attention and family.pre_mlp):
        raise _refusal(model, "its norms stand between branches and residual")
    for sublayer in sublayers:
        if sublayer.stranger is not None:
            raise _refusal(model, f"it is not known how {sublayer.stranger} reads the residual")
    embedding, final, head = _ends(model)
    known = {id(p) for part in (embedding, final, head) for p in part.parameters()}
    known.update(id(p) for p in decoder_layers(model)[1].parameters())
    for name, parameter in model.named_parameters():
        if id(parameter) not in known and ".depth." not in name:
            raise _refusal(model, f"it is not known how {name} reads the residual")
    gains = []
    for norm, _ in norms:
        assert norm is not None
        gain = gain_of(norm, embedding.embedding_dim)
        if gain is None:
            raise _refusal(model, f"its {type(norm).__name__} is no RMSNorm")
        gains.append(gain)
    return gains


def _refusal(model: PreTrainedModel, reason: str) -> UserError:
    kind = model.config.get_text_config().model_type
    return UserError(
        f"rotation: family {kind!r} cannot be rotated: {reason}; 'inputs' fits any family"
    )


def _rotation(weight: Tensor, generator: torch.Generator) -> Rotation:
    """One of the rows of `weight`, float64, where it stands."""
    return Rotation(weight.shape[1], generator=generator).to(weight.device)


def _turn(
    layer: nn.Linear | nn.Embedding | KeyProjection,
    rotation: Rotation,
    gain_D: Tensor | None = None,
) -> None:
    """Make a weight's rows what they must be when their input, less the gain, is rotated."""
    gain = 1.0 if gain_D is None else gain_D.double()
    turned = [rotation(rows.double() * gain).to(rows.dtype) for rows in layer.weight.split(_ROWS)]
    layer.weight = like(layer.weight, torch.cat(turned))


def _turn_router(module: nn.Module, rotation: Rotation) -> None:
    if isinstance(module, DepthRouter):
        queries_RD = module.queries.double() * module.key_norm.double()
        module.queries = like(module.queries, rotation(queries_RD))
        module.key_norm = like(module.key_norm, torch.ones_like(module.key_norm))
    elif isinstance(module, AuthorsRouter):
        _turn(module.q_proj, rotation)
        _turn(module.k_proj, rotation)


def _untie(model: PreTrainedModel) -> None:
    """The head has a weight of its own by now."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
