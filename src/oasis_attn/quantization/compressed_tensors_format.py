"""Export of a quantized model in the format compressed-tensors, which vLLM and SGLang serve.

The compressed-tensors library writes the weights and the `quantization_config`; transformers loads
the folder without this package.  Codes, scales and static ranges are those of the quantized model:
nothing is quantized again.  Integer weights are int8 codes (`int-quantized`) where inputs are
quantized too, and otherwise packed codes (`pack-quantized`); each floating-point format has its own
(`options.float_format`).

In the format, an integer q stands for scale * (q - zero_point), with q from -2^(bits-1) to
2^(bits-1) - 1 (`primitives.QParams` has codes without a zero point).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.files import staged_folder
from oasis_attn.hub.locate import BLOCK_FORMATS
from oasis_attn.hub.model_card import write_card
from oasis_attn.quantization.hf_quantizer import codes_of
from oasis_attn.quantization.linear import QuantizedLinear, fused_layers
from oasis_attn.quantization.options import COMPRESSED_TENSORS, NVFP4_FORMAT, float_format
from oasis_attn.quantization.plain_model import (
    checked_layers,
    float_modules,
    plain_model,
    refusal,
)
from oasis_attn.quantization.primitives import encode_scale, two_level_scales
from oasis_attn.quantization.quantizers import StaticQuantizer
from oasis_attn.quantization.schemes import Scheme
from oasis_attn.quantization.spec import QuantSpec

FP8_CACHE = QuantSpec(bits=8, symmetric=True, element_type="e4m3")
"""The keys and values of each layer in a key-value cache in FP8."""


@torch.no_grad()
def save_compressed_tensors(
    model: PreTrainedModel, folder: str | Path, *, kv_scales: Mapping[str, Tensor] | None = None
) -> None:
    """Write a quantized model in the format compressed-tensors, with a model card.

    `AutoModelForCausalLM.from_pretrained(folder)` loads it without `oasis_attn`.  The library
    decompresses each weight before the folder appears, and the result must be equal bit for bit.
    In float32 the loaded weights are therefore those of `model`; transformers rounds the scales if
    it loads the folder in another dtype.  The block formats (MXFP4, MXFP8, NVFP4) are written in
    bfloat16, the only dtype in which the library restores them; their folders hold the weights of
    `model.to(torch.bfloat16)`.

    Without quantized activations, the logits are equal too.  With them, a layer with the same input
    computes the same, with these exceptions:

    - A value half way between two codes, up to floating-point rounding, may get the other code.
      The inputs of all later layers then change too, so that logits differ by up to about the
      effect of the quantization itself.
    - Symmetric dynamic ranges of integers: the library divides max|x| by (2^bits - 1) / 2, this
      package by 2^(bits-1) - 1.
    - MXFP4 and MXFP8: the library doubles the scale of a group whose largest value is at least 1.75
      times a power of two.  NVFP4: it rounds the scale of a group to bfloat16 first.
    - Dynamic ranges of a layer that does not get its tokens as `[B, T, D]`, such as the MLP of OPT
      (`[N, D]`): the library computes one range for many tokens.

    To serve NVFP4 with an engine that fuses layers, such as vLLM, quantize with
    `Scheme.fused_scales`; transformers does not need it.

    Args:
        model: a quantized model of a family of transformers.
        folder: a new folder.  The tokenizer is not part of it.
        kv_scales: the scales of a key-value cache in FP8, see `kv_scales`; None to leave the cache
            in floating point.

    Raises:
        UserError: the library is not installed; the format cannot hold the scheme or the model;
            weights were changed after quantizing; the folder exists.  Nothing is written then.
    """
    layers, scheme = checked_layers(model, COMPRESSED_TENSORS)
    with staged_folder(folder) as stage:
        _write(model, layers, scheme, stage, kv_scales)


def write_compressed_tensors(
    model: PreTrainedModel, folder: Path, kv_scales: Mapping[str, Tensor] | None = None
) -> None:
    """As `save_compressed_tensors`, into a folder that exists."""
    _write(model, *checked_layers(model, COMPRESSED_TENSORS), folder, kv_scales)


def _write(
    model: PreTrainedModel,
    layers: dict[str, QuantizedLinear],
    scheme: Scheme,
    stage: Path,
    kv_scales: Mapping[str, Tensor] | None,
) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    form = float_format(scheme)
    if not form:
        form = "pack-quantized" if scheme.activation is None else "int-quantized"
    inputs = scheme.activation and arguments(scheme.activation, dynamic=not scheme.static)
    if form == NVFP4_FORMAT and inputs:
        inputs.dynamic = "local"
    group = QuantizationScheme(
        targets=["Linear"],
        weights=arguments(scheme.weight),
        input_activations=inputs,
        format=form,
    )
    plain, dtype = plain_model(model, layers), model.dtype
    if form in BLOCK_FORMATS:
        dtype = torch.bfloat16
        plain.to(dtype)  # type: ignore[arg-type]
    config = QuantizationConfig(
        config_groups={"group_0": group},
        format=form,
        ignore=float_modules(plain, layers),
        quantization_status=QuantizationStatus.FROZEN,
        kv_cache_scheme=arguments(FP8_CACHE) if kv_scales else None,
    )
    apply_quantization_config(plain, config, show_progress=False)
    scales = _weight_scales(layers, scheme)
    for name, layer in layers.items():
        _compress(plain.get_submodule(name), layer, name, dtype, scales[name])
    if kv_scales:
        _set_cache_scales(plain, kv_scales)
    config.quantization_status = QuantizationStatus.COMPRESSED
    plain.save_pretrained(stage)
    ModelCompressor(quantization_config=config).update_config(str(stage))
    kv_cache = "fp8" if kv_scales else ""
    write_card(model, stage, format=COMPRESSED_TENSORS, kv_cache=kv_cache)


def _set_cache_scales(plain: PreTrainedModel, kv_scales: Mapping[str, Tensor]) -> None:
    kinds = ("k_scale", "v_scale")
    parameters = (name for name, _ in plain.named_parameters())
    names = {name for name in parameters if name.rpartition(".")[2] in kinds}
    if different := names ^ kv_scales.keys():
        problem = "lacks" if min(different) in names else "has the unknown name"
        raise UserError(f"kv_scales: it {problem} {min(different)!r}; see the function kv_scales")
    for name, scale in kv_scales.items():
        place, _, kind = name.rpartition(".")
        setattr(plain.get_submodule(place), kind, nn.Parameter(scale, requires_grad=False))


def arguments(spec: QuantSpec, *, dynamic: bool = False) -> Any:
    """The library's description of `spec`."""
    from compressed_tensors.quantization import QuantizationArgs

    scale_dtype = _SCALE_DTYPES.get(spec.scale_type)
    return QuantizationArgs(
        num_bits=spec.bits,
        type="int" if spec.element_type == "int" else "float",
        symmetric=spec.symmetric,
        strategy="tensor_group" if spec.scale_type == "e4m3" else spec.granularity,
        group_size=spec.group_size,
        dynamic=dynamic,
        scale_dtype=scale_dtype,
        zp_dtype=scale_dtype,
    )


_SCALE_DTYPES = {"e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}


def _weight_scales(
    layers: dict[str, QuantizedLinear], scheme: Scheme
) -> dict[str, dict[str, Tensor]]:
    """The scales of weights as the library names them, by layer."""
    if scheme.weight.scale_type != "e4m3":
        return {name: {"weight_scale": layer.weight_scale} for name, layer in layers.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for names in fused_layers(layers) if scheme.fused_scales else [[name] for name in layers]:
        scales = [layers[name].weight_scale for name in names]
        numbers, encode = two_level_scales(torch.cat(scales))
        parts = numbers.split([len(scale) for scale in scales])
        for name, part in zip(names, parts, strict=True):
            found[name] = {"weight_scale": part, "weight_global_scale": encode.clone()}
    return found


def _compress(
    linear: Any,
    layer: QuantizedLinear,
    name: str,
    dtype: torch.dtype,
    scales: dict[str, Tensor],
) -> None:
    """Give `linear` the parameters of `layer`, compress it, and check what it decompresses to."""
    from compressed_tensors.compressors import BaseCompressor, compress_module

    spec, weight = layer.scheme.weight, layer.decode(codes_of(layer, name), dtype)
    parameters = {"weight": weight} | scales
    if not spec.symmetric:
        parameters["weight_zero_point"] = _zero_point(layer.weight_quant_min, spec)
    quantizer = layer.input_quantizer
    if isinstance(quantizer, StaticQuantizer) and quantizer.spec.scale_type == "e4m3":
        parameters["input_global_scale"] = encode_scale(quantizer.scale)
    elif isinstance(quantizer, StaticQuantizer):
        parameters["input_scale"] = quantizer.scale
        if not quantizer.spec.symmetric:
            parameters["input_zero_point"] = _zero_point(quantizer.quant_min, quantizer.spec)
    for key, value in parameters.items():
        shape = getattr(linear, key).shape
        setattr(linear, key, nn.Parameter(value.view(shape), requires_grad=False))
    for key, value in list(linear.named_parameters()):
        if value.is_meta:  # zero points of symmetric schemes; the library's GPU kernels read them
            zeros = torch.zeros_like(value, device=weight.device)
            setattr(linear, key, nn.Parameter(zeros, requires_grad=False))
    compress_module(linear)
    scheme = linear.quantization_scheme
    library = BaseCompressor.get_value_from_registry(scheme.format.value)
    restored = library.decompress(linear.state_dict(), scheme)["weight"].to(weight.dtype)
    if not torch.equal(restored, weight):
        reason = f"compressed-tensors does not restore {name}.weight exactly"
        raise refusal(COMPRESSED_TENSORS, reason)


def _zero_point(quant_min: Tensor, spec: QuantSpec) -> Tensor:
    return -(quant_min + 2 ** (spec.bits - 1)).to(torch.int8)
