"""Conversion of a pretrained model to OASIS and back, without changing the function it computes.

`convert` initializes the new parameters so that the outputs are unchanged: a null logit so low that
the null probability is 0 (arXiv 2605.17887); zero depth queries, so that the mix, equal weights
times the number of sources, is the residual sum (arXiv 2603.15031); and, in families whose own
sinks give a null probability, a beta of 0.  Training then changes them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.files import check_free, staged_folder
from oasis_attn.hub.loading import load_model, quiet
from oasis_attn.hub.prefix import prefix_of
from oasis_attn.hub.sink_family import check_sinks, to_sinks, write_sinks_card
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.depth_cache import DepthRouter
from oasis_attn.modeling.extensions import NULL_SIGNALS, null_signal_module
from oasis_attn.modeling.families import family_of
from oasis_attn.modeling.hf_compat import experts_implementation, set_experts_implementation
from oasis_attn.modeling.layer import OUTPUT_BIAS, RoutedLayer
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.modeling.settings import check_settings
from oasis_attn.modeling.variants import settings_of
from oasis_attn.modeling.weight_names import is_ours
from oasis_attn.ops.normalizers import LEARNED_NULL_LOGIT, WITH_NULL_LOGIT

NULL_OFF = -1e4
"""The null logit that switches the null off: exp(NULL_OFF) is 0 next to that of any real logit."""

_SINK_OFF = -(2.0**14)  # lower than NULL_OFF, and exact in every dtype

_LARGEST_KEY_AT_NULL_OFF = 1.0
"""Null keys with entries up to this size do not raise a null logit of `NULL_OFF` noticeably."""

_NULL_STD = 0.02  # of the keys and values of several nulls

BETA_OFF = -40.0
"""A raw beta that switches the null signal off: its softplus is 4e-18."""


def convert(
    model_or_path: PreTrainedModel | str | Path,
    variant: str = "oasis",
    *,
    trust_remote_code: bool = False,
    **overrides: Any,
) -> OasisForCausalLM:
    """An OASIS model that computes the same function as the given model.

    Args:
        model_or_path: a loaded causal model, or a name or path for `load_model`.  A loaded model
            remains usable and shares its weights with the result; a path is loaded in the dtype of
            its checkpoint.
        variant: a name in `variants()`.  A family with its own learned sinks (gpt-oss) uses them as
            the null: `learned_sink` replaces the normalizers `softmax` and `softmax1`.
            `official` reads a checkpoint in the format of the OASIS authors' code, which does not
            record its normalizers, so that `token_normalizer` and `depth_normalizer` are required.
        trust_remote_code: passed to `load_model` for a path.
        overrides: settings of `OasisConfig` that replace those of the variant.

    Raises:
        UserError: the family is not supported, the variant or a setting would change the function,
            the weights are not those of the family's own model, or the model is quantized or has a
            prefix.
    """
    if variant == "official":
        loading = {"trust_remote_code": trust_remote_code}
        loaded: OasisForCausalLM = _official(model_or_path, "auto", overrides, loading)[0]
        return loaded
    native = model_or_path
    if not isinstance(native, PreTrainedModel | str | Path):
        raise UserError(
            f"model: a {type(native).__name__} is neither a model of transformers nor a name or"
            " path; merge adapters into the model first (merge_and_unload)"
        )
    if not isinstance(native, PreTrainedModel):
        native, _ = load_model(native, dtype="auto", trust_remote_code=trust_remote_code)
    if isinstance(native.config, OasisConfig):
        raise UserError("model: it is an OASIS model already; convert the native checkpoint")
    _check_plain(native)
    config = OasisConfig(
        text_config=native.config, **_initial_settings(native.config, variant, overrides)
    )
    reason = _config_changes_function(config)
    if config.residual == "depth" and config.mix_scale != "sum":
        reason = f"mix_scale: {config.mix_scale!r} scales the sum of the branches"
    if reason is None:
        expected = _native_class(native.config)
        if not isinstance(native, expected):
            raise UserError(f"model: {type(native).__name__} is not {expected.__name__}")
        with torch.device("meta"):
            model = OasisForCausalLM(config)
        _share(model, native)
        reason = _parameter_changes_function(model)
    if reason:
        raise UserError(f"{reason}; conversion would change the function")
    return model


def to_vanilla(model: OasisForCausalLM) -> PreTrainedModel:
    """The family's own model that computes the same function; it shares the weights of `model`.

    In a family with pre-norms, a mix with a `mix_scale` other than "sum" equals the sum up to
    the eps of the norms.

    Raises:
        UserError: a setting or a learned parameter changes the function; the message names it.  Or
            the model is quantized or has a prefix.
    """
    _check_plain(model)
    reason = _config_changes_function(model.config) or _parameter_changes_function(model)
    if reason:
        stored = model.config.normalizer.name == "key_value_null"
        hint = ", but `oasis export` writes such nulls as its prefix" if stored else ""
        raise UserError(f"to_vanilla: {reason}; the family's own model cannot compute this{hint}")
    return without_additions(model)


def without_additions(model: OasisForCausalLM) -> PreTrainedModel:
    """The family's own model with the weights of `model`, which it shares."""
    text = model.config.text_config
    config = type(text).from_dict(text.to_dict())  # resets both implementations to the defaults:
    set_experts_implementation(config, experts_implementation(text))  # keep this one
    with torch.device("meta"):
        native: PreTrainedModel = _native_class(config)(config)
    _share(native, model)
    return native


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    variant: str | None = None,
    overrides: dict[str, Any] | None = None,
    dtype: str = "auto",
    back: bool = False,
    sinks: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Convert the model `source` and save it, with its tokenizer, in the new folder `out`.

    Args:
        source: a name or path for `load_model`.
        out: a folder that does not exist or is empty.
        variant: see `convert`; default `oasis`.
        overrides: settings of `OasisConfig` that replace those of the variant.
        dtype: dtype of the saved weights; `auto` is that of the checkpoint.
        back: convert an OASIS checkpoint to the family's own form, with `to_vanilla`.
        sinks: convert an OASIS checkpoint to a family with sinks, with `to_sinks`.
        device: passed to `load_model`.
        trust_remote_code: passed to `load_model`.

    Raises:
        UserError: see `load_model`, `convert`, `to_vanilla` and `check_sinks`; nothing is written
            in this case.
    """
    check_free(out)
    for name, given in (("to_vanilla", back), ("to_sinks", sinks)):
        if given and (variant or overrides):
            raise UserError(f"{name}: cannot be combined with a variant or settings")
    loading: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    if sinks:
        return _sinks_checkpoint(source, out, dtype, loading)
    model: PreTrainedModel
    if variant == "official":
        model, tokenizer = _official(source, dtype, overrides or {}, loading)
    else:
        model, tokenizer = load_model(source, dtype=dtype, **loading)
        if not back:
            model = convert(model, variant or "oasis", **overrides or {})
        elif isinstance(model, OasisForCausalLM):
            model = to_vanilla(model)
        else:
            raise UserError(
                f"to_vanilla: {str(source)!r} is not an OASIS model; its family is"
                f" {model.config.model_type!r}"
            )
    with quiet(), staged_folder(out) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
    return model


def _sinks_checkpoint(
    source: str | Path, out: str | Path, dtype: str, loading: dict[str, Any]
) -> PreTrainedModel:
    model: Any
    model, tokenizer = load_model(source, dtype=dtype, check=check_sinks, **loading)
    target = to_sinks(model)
    with quiet(), staged_folder(out) as stage:
        target.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        write_sinks_card(target, model.config, stage)
    return target


def _official(
    source: Any, dtype: str, overrides: dict[str, Any], loading: dict[str, Any]
) -> tuple[Any, Any]:
    """Load a checkpoint of the authors' code, with `attn_res_sa` and `attn_res_mlp` modules."""
    check_settings(overrides)
    for name in ("token_normalizer", "depth_normalizer"):
        if name not in overrides:
            raise UserError(f"{name}: required, because the authors' checkpoints do not record it")
    if isinstance(source, PreTrainedModel):
        raise UserError("model: the variant 'official' needs the name or folder of a checkpoint")
    return load_model(source, dtype=dtype, overrides=settings_of("official") | overrides, **loading)


def _initial_settings(
    text_config: PreTrainedConfig, variant: str, overrides: dict[str, Any]
) -> dict[str, Any]:
    """The variant's settings with the method switched off.

    `overrides` take precedence; the caller checks later whether they change the function.
    """
    check_settings(overrides)
    settings = settings_of(variant)
    sinks = family_of(text_config).sinks
    if sinks and settings["token_normalizer"] in ("softmax", "softmax1"):
        settings["token_normalizer"] = "learned_sink"
    settings |= overrides
    given = settings["token_normalizer"]
    normalizer = given.get("name") if isinstance(given, dict) else given
    off: dict[str, Any] = {}
    if normalizer in LEARNED_NULL_LOGIT:
        off["null_logit"] = 0.0 if sinks else _SINK_OFF
    elif normalizer in WITH_NULL_LOGIT:
        off["null_logit"] = NULL_OFF
    if settings["residual"] == "depth":
        off["mix_scale"] = "sum"
    registered = settings["null_signal"] not in ("off", *NULL_SIGNALS.own)  # may be above 0
    if registered or (sinks and settings["null_signal"] != "off"):
        off["beta_init"] = BETA_OFF
    return off | settings


def _check_plain(model: PreTrainedModel) -> None:
    """Raise `UserError` if `model` has a prefix or is quantized."""
    if prefix_of(model) is not None:
        raise UserError(
            "model: conversion would remove its prefix; convert the model without the prefix"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError(
            "model: it is quantized; convert the original model, then quantize the result"
        )


def _config_changes_function(config: OasisConfig) -> str | None:
    """The setting, if any, with which no parameters give the function of the family's own model."""
    if config.normalizer.name not in ("softmax", *WITH_NULL_LOGIT):
        return f"token_normalizer: {config.token_normalizer!r} cannot equal softmax"
    if config.normalizer.name == "softmax1" and config.null_logit > NULL_OFF:
        return f"null_logit: {config.null_logit!r} is above {NULL_OFF}, so the null is not off"
    if config.output_gate != "none":
        return f"output_gate: {config.output_gate!r} scales the attention output"
    if getattr(config.text_config, OUTPUT_BIAS, False):
        return f"{OUTPUT_BIAS}: True adds a bias that the family's own model does not have"
    if config.branch_norm != "none":
        return f"branch_norm: {config.branch_norm!r} scales the branches"
    if config.residual == "official":
        return "residual: 'official' cannot equal a sum of branches"
    return None


def _parameter_changes_function(model: OasisForCausalLM) -> str | None:
    """The added parameter, if any, whose value changes the function."""
    for layer in model.model.layers:
        reason = _null_changes_function(layer)
        if reason:
            return reason
    router = model.model.depth
    if router is None:
        return None
    learned = router.queries.ne(0).any(-1).sum()
    if learned:
        return f"queries: {learned} of {len(router.queries)} depth routers have a learned query"
    sinks = family_of(model.config.text_config).sinks
    if sinks and router.beta_raw is not None and router.beta_raw.max() > BETA_OFF:
        # Without sinks the null is off here, so that there is no null evidence.
        learned = f"{router.beta_raw.max():.3g}"
        return f"beta_raw: {learned} makes routing depend on the family's sinks"
    return None


def _null_changes_function(layer: RoutedLayer) -> str | None:
    logit, key, value = layer.null_logit, layer.null_key, layer.null_value
    if logit is not None:
        if logit.max() > NULL_OFF:
            return (
                f"null_logit: layer {layer.index} has the learned value {logit.max():.3g}, and the"
                f" null is off only at {NULL_OFF:g} or below"
            )
        if key is not None and key.abs().max() > _LARGEST_KEY_AT_NULL_OFF:
            return f"null_key: layer {layer.index} has the learned value {key.abs().max():.3g}"
        return None
    # The null is the family's own sink: it must have its logit, and no value.
    for name, x in (("null_key", key), ("null_value", value)):
        if x is not None and (x.any() or x.shape[1] > 1):
            return f"{name}: layer {layer.index} has {x.shape[1]} nulls beside the family's sinks"
    return None


def _native_class(text_config: PreTrainedConfig) -> Any:
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]


@torch.no_grad()
def _share(target: PreTrainedModel, source: PreTrainedModel) -> None:
    """Assign the tensors of `source` to `target`, which is on the meta device.

    Parameters that `target` adds are initialized so that the method is switched off.
    """
    if isinstance(target, OasisForCausalLM):
        _initialize_added(target, source)
    found = target.load_state_dict(source.state_dict(), strict=False, assign=True)
    unexpected = [name for name in found.unexpected_keys if not is_ours(name)]
    missing = [name for name in found.missing_keys if not is_ours(name)]
    if unexpected:
        raise UserError(f"model: {unexpected[0]} is not a weight of the family's own model")
    if missing:
        raise UserError(f"model: the weight {missing[0]} of the family's own model is missing")
    for name, buffer in source.named_buffers():  # includes buffers that are not in the state dict
        module, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(module), leaf, buffer)
    target.tie_weights()
    target.generation_config = copy.deepcopy(source.generation_config)
    target.config.name_or_path = source.config.name_or_path
    target.train(source.training)


def _initialize_added(model: OasisForCausalLM, native: PreTrainedModel) -> None:
    """Allocate the parameters that `native` does not have, and switch the method off."""
    for layer in model.model.layers:
        for name, start in _initial_null(layer).items():
            setattr(layer, name, nn.Parameter(start.to(native.device, native.dtype)))
    # At least float32; from_pretrained keeps these parameters so too.
    precise = torch.promote_types(native.dtype, torch.float32)
    if model.model.depth is not None:
        model.model.depth = DepthRouter(model.config).to(native.device, precise)
    if (signal := null_signal_module(model.config)) is not None:
        model.model.null_signal = signal.to(native.device, precise)


def _initial_null(layer: RoutedLayer) -> dict[str, Tensor]:
    """Parameters of the null, which is switched off: keys and values are 0 if there is one null.

    Several equal nulls would always remain equal, so that theirs are small random vectors.
    """
    initial: dict[str, Tensor] = {}
    if layer.null_logit is not None:
        off = _SINK_OFF if layer.family.sinks else layer.oasis_config.null_logit
        initial["null_logit"] = torch.full(layer.null_logit.shape, off)
    generator = torch.Generator().manual_seed(layer.index)
    for name in ("null_key", "null_value"):
        if (parameter := getattr(layer, name)) is not None:
            drawn = torch.randn(parameter.shape, generator=generator) * _NULL_STD
            initial[name] = drawn if parameter.shape[1] > 1 else torch.zeros_like(drawn)
    return initial
