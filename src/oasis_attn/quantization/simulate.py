"""Quantise a model by simulation: values go to a grid's levels, arithmetic stays in floats."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError, check_choice
from oasis_attn.modeling.hf_quantizer import PrefixQuantizer
from oasis_attn.quantization.gptq import gptq
from oasis_attn.quantization.linear import QuantizedLinear, replace_linear, transform_input
from oasis_attn.quantization.linearize import expert_of, linear_names, linearize
from oasis_attn.quantization.quantizers import StaticQuantizer, observing_together
from oasis_attn.quantization.rotate import rotate, rotate_inputs
from oasis_attn.quantization.saved import mark
from oasis_attn.quantization.schemes import Scheme, schemes
from oasis_attn.quantization.sites import add_quantizer, linear_sites, tensor_sites
from oasis_attn.quantization.smooth import smooth


def scheme_sites(model: PreTrainedModel, scheme: Scheme) -> tuple[str, ...]:
    """The names of all that `scheme` quantises in `model`."""
    tensors = tensor_sites(model) if scheme.sites == "full" else ()
    return *linear_sites(model, head=scheme.head), *tensors


def quantized_sites(model: nn.Module) -> dict[str, QuantizedLinear | StaticQuantizer]:
    """What is quantised in `model`, by name: the linear layers, then the quantisers of tensors."""
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
    sites: Collection[str] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A quantised copy of `model`, in eval mode; `model` itself is left as it is.

    The copy is rotated, then smoothed, where the scheme says so; its weights are rounded; then its
    static ranges are found.  It holds its own quantised weights and shares with `model` all tensors
    that are as they were: train one, and the other changes.  A quantised head is untied from the
    embedding.

    Args:
        model: a transformers decoder, ours or any other.
        scheme: a name in `schemes()`, or a `Scheme`.
        calibration: batches of token ids, int64 [B, T], without padding (the literature takes 16);
            needed by a static scheme, SmoothQuant and GPTQ, refused by any other.  Ranges are those
            of tensors met with quantised weights and unquantised activations.
        sites: the exact names of what to quantise; default `scheme_sites(model, scheme)`.
        seed: of a rotation.

    Raises:
        UserError: unknown scheme or site, missing, unusable or needless calibration, a site that no
            calibration token reached, weights or activations that are not finite.
    """
    if isinstance(scheme, str):
        check_choice("scheme", scheme, schemes())
        scheme = schemes()[scheme]
    if scheme.needs_calibration and calibration is None:
        raise UserError(f"calibration: None given, but {scheme.name!r} needs batches of token ids")
    if not scheme.needs_calibration and calibration is not None:
        raise UserError(f"calibration: given, but {scheme.name!r} takes each input's own range")
    names = _checked_sites(model, scheme, sites)
    batches = None if calibration is None else _checked_batches(model, calibration)

    twin = transformed(model, scheme, batches, names, seed)
    for name, layer in _rounded(twin, scheme, batches, names).items():
        replace_linear(twin, name, layer)
    for name in names:
        if ":" in name:
            add_quantizer(twin, name, scheme)
    if scheme.static and batches is not None:
        _calibrate(twin, batches)
    kinds = {
        name.removesuffix(".input_transform"): type(module).__name__
        for name, module in twin.named_modules()
        if name.endswith(".input_transform")
    }
    mark(twin, {"scheme": scheme.to_dict(), "sites": names, "transforms": kinds})
    return twin


def transformed(
    model: PreTrainedModel,
    scheme: Scheme,
    batches: list[Tensor] | None,
    names: Collection[str],
    seed: int,
) -> PreTrainedModel:
    """A copy of `model` in eval mode, rotated or smoothed where `scheme` says so, nothing rounded.

    All of `names` that are linear layers are `nn.Linear` modules in it.  It shares all tensors with
    `model` that this leaves as they are.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared).eval()
    linearize(twin, names)
    transforms: dict[str, nn.Module] = {}
    if scheme.rotation == "hadamard":
        transforms = rotate(twin, seed=seed)
    elif scheme.rotation == "inputs":
        transforms = rotate_inputs(twin, seed=seed)
    elif scheme.smooth_alpha is not None and batches is not None:
        transforms = smooth(twin, batches, alpha=scheme.smooth_alpha)
    for name, transform in transforms.items():
        transform_input(twin.get_submodule(name), transform)
    return twin


def _rounded(
    model: PreTrainedModel, scheme: Scheme, batches: list[Tensor] | None, names: tuple[str, ...]
) -> dict[str, QuantizedLinear]:
    """The quantised layers, not yet in place."""
    layers = {name: cast(nn.Linear, model.get_submodule(name)) for name in names if ":" not in name}
    weights: dict[str, Tensor] = {}
    if scheme.rounding == "gptq" and batches is not None:
        weights = gptq(model, batches, layers, scheme.weight, estimator=scheme.estimator)
        missed = [name for name in layers if name not in weights]
        if missed:
            warnings.warn(
                f"calibration: no token reached {len(missed)} of {len(layers)} layers, as"
                f" {missed[0]}; GPTQ rounds the weights of these experts to nearest",
                stacklevel=3,
            )
    return {
        name: QuantizedLinear.rounded(layer, scheme, site=name, weight=weights.get(name))
        for name, layer in layers.items()
    }


def check_unquantized(model: PreTrainedModel) -> None:
    """Raise `UserError` if we, or another library, have quantised something in `model`."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantized_sites(model) or type(quantizer) not in (type(None), PrefixQuantizer):
        raise UserError("model: it is quantised already; take the original instead")


def _checked_sites(
    model: PreTrainedModel, scheme: Scheme, sites: Collection[str] | None
) -> tuple[str, ...]:
    check_unquantized(model)
    if sites is None:
        names = scheme_sites(model, scheme)
    else:
        tensors = tensor_sites(model) if scheme.sites == "full" else ()
        known = dict.fromkeys([*linear_names(model), *tensors])
        chosen = set(sites)
        for name in sites:
            check_choice("sites", name, known)
        names = tuple(name for name in known if name in chosen)
    if not names:
        raise UserError(f"sites: they name no linear layer of {type(model).__name__}")
    return names


def _checked_batches(model: PreTrainedModel, calibration: Iterable[Tensor]) -> list[Tensor]:
    vocabulary = model.config.get_text_config().vocab_size
    batches = list(calibration)
    for tokens_BT in batches:
        _check_tokens(tokens_BT, vocabulary)
    if not batches:
        raise UserError("calibration: it holds no batch")
    return batches


@torch.no_grad()
def _calibrate(model: PreTrainedModel, batches: list[Tensor]) -> None:
    """Run the batches through `model` and fix the range of every static quantiser in it.

    The experts of a layer share one range: they read parts of one tensor, and few tokens, or none,
    may reach any single one.
    """
    alone: list[StaticQuantizer] = []
    together: dict[tuple[str, str], list[StaticQuantizer]] = {}
    for name, module in model.named_modules():
        if isinstance(module, StaticQuantizer):
            expert = expert_of(model, name.rpartition(".")[0])
            (together.setdefault(expert, []) if expert else alone).append(module)
    head = isinstance(model.get_output_embeddings(), QuantizedLinear)
    run = model if head else model.base_model
    with ExitStack() as stack:
        for quantizer in alone:
            stack.enter_context(quantizer.observing())
        for (path, layer), quantizers in together.items():
            pool = stack.enter_context(observing_together(quantizers, f"{path}.{layer}.input"))
            experts = model.get_submodule(path)
            stack.callback(experts.register_forward_hook(pool.flush).remove)
        for tokens_BT in batches:
            run(input_ids=tokens_BT.to(model.device), use_cache=False)


def _check_tokens(tokens_BT: Tensor, vocabulary: int) -> None:
    shape = tuple(tokens_BT.shape)
    if tokens_BT.dtype != torch.int64 or tokens_BT.ndim != 2 or not tokens_BT.numel():
        raise UserError(
            f"calibration: a batch is {tokens_BT.dtype} {shape}, not int64 [batch, tokens]"
        )
    low, high = int(tokens_BT.min()), int(tokens_BT.max())
    if low < 0 or high >= vocabulary:
        raise UserError(
            f"calibration: token ids {low} .. {high} are not all in 0 .. {vocabulary - 1}"
        )
