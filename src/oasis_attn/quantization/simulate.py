"""Quantize a model by simulation: values are rounded, and arithmetic stays in floating point."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from oasis_attn.errors import (
    UserError,
    check_choice,
    check_iterable,
    check_loaded,
    check_seed,
    shown,
)
from oasis_attn.hub.prefix_storage import METHOD as PREFIX_METHOD
from oasis_attn.hub.prefix_storage import PrefixHfQuantizer
from oasis_attn.quantization.calibration import check_batches, run_batch
from oasis_attn.quantization.fitted import fit_inputs
from oasis_attn.quantization.gptq import gptq
from oasis_attn.quantization.hf_quantizer import set_quantization_config
from oasis_attn.quantization.linear import (
    QuantizedLinear,
    replace_linear,
    transform_input,
    weight_qparams,
)
from oasis_attn.quantization.linearize import expert_of, linear_names, linearize
from oasis_attn.quantization.quantizers import StaticQuantizer, calibrating_together
from oasis_attn.quantization.rotation import rotate_inputs, rotate_residual, rotate_weights
from oasis_attn.quantization.schemes import Scheme, get_scheme
from oasis_attn.quantization.smoothquant import smooth
from oasis_attn.quantization.targets import add_quantizer, linear_targets, tensor_targets


def scheme_targets(model: PreTrainedModel, scheme: Scheme) -> tuple[str, ...]:
    """The names of everything that `scheme` quantizes in `model`."""
    tensors = tensor_targets(model) if scheme.targets == "full" else ()
    return *linear_targets(model, head=scheme.head), *tensors


def quantized_modules(model: nn.Module) -> dict[str, QuantizedLinear | StaticQuantizer]:
    """The quantizing modules of `model` by target: linear layers, then quantizers of tensors."""
    found: dict[str, QuantizedLinear | StaticQuantizer] = {}
    tensors: dict[str, QuantizedLinear | StaticQuantizer] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found[name] = module
            continue
        for child, quantizer in module.named_children():
            if isinstance(quantizer, StaticQuantizer):
                tensors[f"{name}:{child.removesuffix('_quantizer')}"] = quantizer
    return found | tensors


def quantize(
    model: PreTrainedModel,
    scheme: str | Scheme = "w8a8-static-linear",
    *,
    calibration: Iterable[Tensor] | None = None,
    targets: Collection[str] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Return a quantized copy of `model` in eval mode; `model` itself does not change.

    The steps are rotation or smoothing (if the scheme has one of them), rounding of the weights,
    and calibration of static ranges.  Calibration runs the model with quantized weights and
    unquantized activations.  The copy has its own quantized weights and shares all other tensors
    with `model`, so that training one of them changes the other.  A quantized output head is untied
    from the embedding.

    Args:
        model: a decoder of transformers or of this library.
        scheme: a name in `schemes()`, or a `Scheme`.
        calibration: batches of token ids, int64 [B, T], without padding, or of embeddings,
            floating point [B, T, D]; the literature uses 16 batches.  Static schemes, SmoothQuant,
            fitted transforms and GPTQ need it; other schemes do not accept it.
        targets: the exact names of what to quantize; by default `scheme_targets(model, scheme)`.
        seed: random seed of the rotation.

    Raises:
        UserError: an unknown scheme or target, missing, unusable or unnecessary calibration data, a
            target that no calibration token reached, or weights or activations that are not finite.
    """
    check_loaded(model)
    scheme = get_scheme(scheme)
    check_seed("seed", seed)
    if scheme.needs_calibration and calibration is None:
        raise UserError(f"calibration: None given, but {scheme.name!r} needs batches of token ids")
    if not scheme.needs_calibration and calibration is not None:
        raise UserError(f"calibration: given, but {scheme.name!r} does not need calibration data")
    names = _checked_targets(model, scheme, targets)
    batches = None if calibration is None else check_batches(model, calibration)

    quantized = transformed_copy(model, scheme, batches, names, seed)
    for name, layer in _quantized_layers(quantized, scheme, batches, names).items():
        replace_linear(quantized, name, layer)
    for name in names:
        if ":" in name:
            add_quantizer(quantized, name, scheme)
    if scheme.static and batches is not None:
        _calibrate(quantized, batches)
    transforms = {
        name.removesuffix(".input_transform"): type(module).__name__
        for name, module in quantized.named_modules()
        if name.endswith(".input_transform")
    }
    fields = {"scheme": scheme.to_dict(), "targets": names, "transforms": transforms}
    set_quantization_config(quantized, fields)
    return quantized


def transformed_copy(
    model: PreTrainedModel,
    scheme: Scheme,
    batches: list[Tensor] | None,
    names: Collection[str],
    seed: int,
) -> PreTrainedModel:
    """Return an unquantized copy of `model` in eval mode, rotated or smoothed as `scheme` says.

    All linear layers in `names` are `nn.Linear` modules in the copy; no other layer gets work at
    inference time.  The copy shares all tensors that do not change with `model`.

    Raises:
        UserError: a rotation of the residual stream would change what the model computes.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    result = copy.deepcopy(model, shared).eval()
    linearize(result, names)
    transforms: dict[str, nn.Module] = {}
    layers = set(names)
    if scheme.rotation == "hadamard":
        transforms = rotate_residual(result, seed=seed, layers=layers)
    elif scheme.rotation == "folded":
        rotate_weights(result, seed=seed)
    elif scheme.rotation in ("inputs", "groups"):
        size = scheme.rotated_together
        transforms = rotate_inputs(result, seed=seed, group_size=size, layers=layers)
    elif scheme.rotation == "fitted" and batches is not None:
        transforms = fit_inputs(result, batches, seed=seed, layers=layers)
    elif scheme.smooth_alpha is not None and batches is not None:
        transforms = smooth(result, batches, alpha=scheme.smooth_alpha, layers=layers)
    for name, transform in transforms.items():
        transform_input(result.get_submodule(name), transform)
    return result


def _quantized_layers(
    model: PreTrainedModel, scheme: Scheme, batches: list[Tensor] | None, names: tuple[str, ...]
) -> dict[str, QuantizedLinear]:
    """The quantized layers by name; `model` does not contain them yet."""
    layers = {name: cast(nn.Linear, model.get_submodule(name)) for name in names if ":" not in name}
    weights: dict[str, Tensor] = {}
    ranges: Any = {"observer": scheme.observer, "fused_scales": scheme.fused_scales}
    if scheme.rounding == "gptq" and batches is not None:
        weights = gptq(model, batches, layers, scheme.weight, **ranges)
        missed = [name for name in layers if name not in weights]
        if missed:
            warnings.warn(
                f"calibration: no token reached {len(missed)} of {len(layers)} layers, for example"
                f" {missed[0]}; the weights of these experts are rounded to nearest",
                stacklevel=3,
            )
    qparams = weight_qparams(layers, scheme.weight, **ranges)
    return {
        name: QuantizedLinear.from_linear(
            layer, scheme, qparams[name], name=name, gptq_weight=weights.get(name)
        )
        for name, layer in layers.items()
    }


def check_unquantized(model: PreTrainedModel) -> None:
    """Raise `UserError` if `model` is quantized, by this library or another."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantized_modules(model) or type(quantizer) not in (type(None), PrefixHfQuantizer):
        raise UserError("model: it is already quantized; use the original model")


def check_unquantized_config(config: PreTrainedConfig) -> None:
    """Raise `UserError` if `config` is that of a quantized model; call it before loading."""
    for part in (config, config.get_text_config(decoder=True)):
        stored: Any = getattr(part, "quantization_config", None)
        fields = stored if isinstance(stored, dict | None) else vars(stored)
        method = (fields or {}).get("quant_method")
        if method not in (None, PREFIX_METHOD):
            method = getattr(method, "value", method)
            raise UserError(
                f"model: {shown(config.name_or_path)} is already quantized, by {method}; use the"
                " original model"
            )


def _checked_targets(
    model: PreTrainedModel, scheme: Scheme, targets: Collection[str] | None
) -> tuple[str, ...]:
    check_unquantized(model)
    if targets is None:
        names = scheme_targets(model, scheme)
    else:
        check_iterable("targets", targets, "a list of names")
        tensors = tensor_targets(model) if scheme.targets == "full" else ()
        known = dict.fromkeys([*linear_names(model), *tensors])
        for name in targets:
            check_choice("targets", name, known)
        chosen = set(targets)
        names = tuple(name for name in known if name in chosen)
    if not names:
        raise UserError(f"targets: they name no linear layer of {type(model).__name__}")
    return names


@torch.no_grad()
def _calibrate(model: PreTrainedModel, batches: list[Tensor]) -> None:
    """Run the batches through `model` and fix the range of every static quantizer.

    The experts of a layer share one range, because they read parts of one tensor and a single
    expert may get few tokens or none.
    """
    single: list[StaticQuantizer] = []
    shared: dict[tuple[str, str], list[StaticQuantizer]] = {}
    for name, module in model.named_modules():
        if isinstance(module, StaticQuantizer):
            expert = expert_of(model, name.rpartition(".")[0])
            (shared.setdefault(expert, []) if expert else single).append(module)
    inside = set(model.base_model.modules())
    run = model.base_model if inside.issuperset([*single, *chain(*shared.values())]) else model
    with ExitStack() as stack:
        for quantizer in single:
            stack.enter_context(quantizer.calibrating())
        for (path, layer), quantizers in shared.items():
            observer = stack.enter_context(
                calibrating_together(quantizers, f"{path}.{layer}.input")
            )
            experts = model.get_submodule(path)
            stack.callback(experts.register_forward_hook(observer.flush).remove)
        for batch in batches:
            run_batch(run, batch)
