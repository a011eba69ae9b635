"""A pretrained model becomes OASIS, and goes back, without a change in the function it computes.

Conversion starts every part of the method where it does nothing, exactly: a null logit so low that
the null mass is 0 (arXiv 2605.17887); zero depth queries, whose equal weights, times the number of
sources, make the residual sum (arXiv 2603.15031); and, where a family's own sinks leave null mass,
a beta of 0.  Training moves each from there.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.files import check_free, staged_folder
from oasis_attn.modeling.configuration import OasisConfig, check_settings
from oasis_attn.modeling.depth_cache import DepthRouter
from oasis_attn.modeling.families import family_of
from oasis_attn.modeling.loading import load_model, quiet
from oasis_attn.modeling.model import OasisForCausalLM
from oasis_attn.modeling.prefix import prefix_of
from oasis_attn.modeling.variants import settings_of
from oasis_attn.modeling.weight_names import is_ours

NULL_OFF = -1e4
"""A null logit at which the null is switched off: exp(NULL_OFF) is 0 beside any real logit."""

_SINK_OFF = -(2.0**14)  # below that, and the same in every dtype

BETA_OFF = -40.0
"""A raw beta at which the null signal is switched off: its softplus is 4e-18."""

_WITH_OFF = ("softmax", "softmax1", "learned_sink")  # softmax itself at a null logit of NULL_OFF


def convert(
    model_or_path: PreTrainedModel | str | Path,
    variant: str = "oasis",
    *,
    trust_remote_code: bool = False,
    **overrides: Any,
) -> OasisForCausalLM:
    """A model of ours that computes what the given one computes.

    Args:
        model_or_path: a loaded causal model, which stays usable and shares its weights with the
            result, or what `load_model` takes; a path is loaded in its checkpoint's own dtype.
        variant: a name from `variants()`.  In a family with sinks of its own (gpt-oss) these are
            the null: its normalizer is then `learned_sink` in place of `softmax` or `softmax1`.
            `official` reads a checkpoint in the OASIS authors' own form, which does not record its
            normalizers: `token_normalizer` and `depth_normalizer` must be given.
        trust_remote_code: of `load_model`, for a path.
        overrides: settings of `OasisConfig`, over the variant's.

    Raises:
        UserError: the family has no exact adapter, the variant or a setting cannot keep the
            function, or the weights are not those that the family's own model has.
    """
    if variant == "official":
        loaded: OasisForCausalLM = _official(model_or_path, "auto", overrides, trust_remote_code)[0]
        return loaded
    native = model_or_path
    if not isinstance(native, PreTrainedModel):
        native, _ = load_model(native, dtype="auto", trust_remote_code=trust_remote_code)
    if isinstance(native.config, OasisConfig):
        raise UserError("model: it is of our family already; convert its vanilla checkpoint")
    if prefix_of(native) is not None:
        raise UserError(
            "model: it has a prefix, which conversion loses; convert the one without it"
        )
    config = OasisConfig(
        text_config=native.config, **_starting_settings(native.config, variant, overrides)
    )
    reason = _changes(config)
    if config.residual == "depth" and config.mix_scale != "sum":
        reason = f"mix_scale: {config.mix_scale!r} makes another scale of the branches' sum"
    if reason is None:
        expected = _native_class(native.config)
        if not isinstance(native, expected):
            raise UserError(f"model: {type(native).__name__} is not {expected.__name__}")
        with torch.device("meta"):
            model = OasisForCausalLM(config)
        _share(model, native)
        reason = _moved(model)
    if reason:
        raise UserError(f"{reason}; conversion would change the function")
    return model


def to_vanilla(model: OasisForCausalLM) -> PreTrainedModel:
    """The family's own model with the same function, sharing the weights of `model`.

    In a family with pre-norms a mix of another `mix_scale` than "sum" equals the sum up to
    the norms' eps.

    Raises:
        UserError: a part of the method is in use, and which.
    """
    reason = _changes(model.config) or _moved(model)
    if reason:
        raise UserError(f"to_vanilla: {reason}; the family's own model computes otherwise")
    text = model.config.text_config
    config = type(text).from_dict(text.to_dict())  # less our attention function,
    config._experts_implementation = text._experts_implementation  # and not less this one
    with torch.device("meta"):
        native: PreTrainedModel = _native_class(config)(config)
    _share(native, model)
    return native


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    variant: str | None = None,
    settings: dict[str, Any] | None = None,
    dtype: str = "auto",
    back: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Convert the model `source` into the new folder `out`, its tokenizer beside it.

    Args:
        source: what `load_model` takes.
        out: a folder that does not exist, or is empty.
        variant, settings: as for `convert`; default `oasis`.
        dtype: of the saved weights; `auto` is the checkpoint's own.
        back: make the family's own checkpoint of one of ours: `to_vanilla`.
        trust_remote_code: of `load_model`.

    Raises:
        UserError: as `load_model`, `convert` and `to_vanilla` do; nothing is written then.
    """
    check_free(out)
    if back and (variant or settings):
        raise UserError("to_vanilla: it takes no variant and no settings")
    model: PreTrainedModel
    if variant == "official":
        model, tokenizer = _official(source, dtype, settings or {}, trust_remote_code)
    else:
        model, tokenizer = load_model(source, dtype=dtype, trust_remote_code=trust_remote_code)
        if not back:
            model = convert(model, variant or "oasis", **settings or {})
        elif isinstance(model, OasisForCausalLM):
            model = to_vanilla(model)
        else:
            raise UserError(f"to_vanilla: {str(source)!r} is {model.config.model_type!r} already")
    with quiet(), staged_folder(out) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
    return model


def _official(
    source: Any, dtype: str, overrides: dict[str, Any], trust_remote_code: bool
) -> tuple[Any, Any]:
    """A checkpoint with `attn_res_sa` and `attn_res_mlp` in its layers, as it stands."""
    check_settings(overrides)
    for name in ("token_normalizer", "depth_normalizer"):
        if name not in overrides:
            raise UserError(f"{name}: the authors' checkpoints do not record it; it must be given")
    if isinstance(source, PreTrainedModel):
        raise UserError("model: the variant 'official' reads a checkpoint; give its name or folder")
    return load_model(
        source,
        dtype=dtype,
        settings=settings_of("official") | overrides,
        trust_remote_code=trust_remote_code,
    )


def _starting_settings(
    text_config: PreTrainedConfig, variant: str, overrides: dict[str, Any]
) -> dict[str, Any]:
    """The variant's settings, its parts switched off; overrides win, and are judged later."""
    check_settings(overrides)
    settings = settings_of(variant)
    sinks = family_of(text_config).sinks
    if sinks and settings["token_normalizer"] in ("softmax", "softmax1"):
        settings["token_normalizer"] = "learned_sink"
    settings |= overrides
    off: dict[str, Any] = {}
    if settings["token_normalizer"] == "softmax1":
        off["null_logit"] = NULL_OFF
    if settings["residual"] == "depth":
        off["mix_scale"] = "sum"
    if sinks and settings["null_signal"] != "off":
        off["beta_init"] = BETA_OFF
    return off | settings


def _changes(config: OasisConfig) -> str | None:
    """The setting that alone makes the function another than the family's own, if one does."""
    if config.normalizer.name not in _WITH_OFF:
        return f"token_normalizer: {config.token_normalizer!r} has no state that equals softmax"
    if config.normalizer.name == "softmax1" and config.null_logit > NULL_OFF:
        return f"null_logit: {config.null_logit!r} is above {NULL_OFF}, where the null is off"
    if config.output_gate != "none":
        return f"output_gate: {config.output_gate!r} scales the attention output"
    if config.branch_norm != "none":
        return f"branch_norm: {config.branch_norm!r} makes branches of another size"
    if config.residual == "official":
        return "residual: 'official' has no state that equals a sum of branches"
    return None


def _moved(model: OasisForCausalLM) -> str | None:
    """The parameter of ours that changes the function, if one does."""
    for layer in model.model.layers:
        sink = layer.null_logit
        if sink is not None and sink.max() > NULL_OFF:
            return f"null_logit: layer {layer.index} has learned {sink.max():.3g}"
    router = model.model.depth
    if router is None:
        return None
    learned = router.queries.ne(0).any(-1).sum()
    if learned:
        return f"queries: {learned} of {len(router.queries)} depth routers have learned theirs"
    sinks = family_of(model.config.text_config).sinks
    if sinks and router.beta_raw is not None and router.beta_raw.max() > BETA_OFF:
        # All other nulls are off, and with them the evidence.
        learned = f"{router.beta_raw.max():.3g}"
        return f"beta_raw: {learned} lets the family's own sinks move the depth weights"
    return None


def _native_class(text_config: PreTrainedConfig) -> Any:
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]


@torch.no_grad()
def _share(target: PreTrainedModel, source: PreTrainedModel) -> None:
    """Give `target`, on the meta device, the tensors of `source`; ours start switched off."""
    if isinstance(target, OasisForCausalLM):
        _add_ours(target, source)
    found = target.load_state_dict(source.state_dict(), strict=False, assign=True)
    strangers = [name for name in found.unexpected_keys if not is_ours(name)]
    absent = [name for name in found.missing_keys if not is_ours(name)]
    if strangers or absent:
        name = (strangers + absent)[0]
        raise UserError(f"model: {name} is not where the family's own model has it")
    for name, buffer in source.named_buffers():  # those outside the state dict among them
        module, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(module), leaf, buffer)
    target.tie_weights()
    target.generation_config = copy.deepcopy(source.generation_config)
    target.config.name_or_path = source.config.name_or_path
    target.train(source.training)


def _add_ours(model: OasisForCausalLM, native: PreTrainedModel) -> None:
    """Our own parameters, off the meta device and in their starting state."""
    for layer in model.model.layers:
        if layer.null_logit is not None:
            off = torch.full(layer.null_logit.shape, _SINK_OFF, dtype=native.dtype)
            layer.null_logit = nn.Parameter(off.to(native.device))
    if model.model.depth is not None:
        precise = torch.promote_types(native.dtype, torch.float32)  # kept so by from_pretrained too
        model.model.depth = DepthRouter(model.config).to(native.device, precise)
