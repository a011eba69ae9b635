"""A quantized linear layer, and its form on disk: codes and scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.quantization.casts import FixedPrecisionModule
from oasis_attn.quantization.hf_quantizer import CODES
from oasis_attn.quantization.primitives import QParams, fake_quantize, round_codes, to_blocks
from oasis_attn.quantization.quantizers import DynamicQuantizer, StaticQuantizer, observe_qparams
from oasis_attn.quantization.schemes import Scheme
from oasis_attn.quantization.spec import FLOAT_TYPES, QuantSpec

_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Names of layers of one module that read the same input."""


def fused_layers(layers: Mapping[str, nn.Linear]) -> list[list[str]]:
    """The names of the layers in groups that engines such as vLLM multiply by as one matrix."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        fused = next((names for names in _FUSED if last in names), last)
        groups.setdefault((parent, fused, layer.in_features), []).append(name)
    return list(groups.values())


def weight_qparams(
    layers: Mapping[str, nn.Linear],
    spec: QuantSpec,
    *,
    observer: str = "minmax",
    fused_scales: bool = False,
) -> dict[str, QParams]:
    """The quantization parameters of the weights by layer name.

    With `fused_scales`, which is for `e4m3` scales, each group of `fused_layers` is one tensor.
    """
    groups = fused_layers(layers) if fused_scales else [[name] for name in layers]
    found: dict[str, QParams] = {}
    for names in groups:
        weights = [layers[name].weight.detach() for name in names]
        together = weights[0] if len(weights) == 1 else torch.cat(weights)
        label = ", ".join(f"{name}.weight" for name in names)
        qparams = observe_qparams(together, spec, observer=observer, name=label)
        if len(names) == 1:
            found[names[0]] = qparams
            continue
        rows = [len(weight) for weight in weights]
        parts = zip(*(part.split(rows) for part in qparams), strict=True)
        found |= {name: QParams(*part) for name, part in zip(names, parts, strict=True)}
    return found


class QuantizedLinear(FixedPrecisionModule, nn.Linear):
    """A linear layer with a quantized weight that quantizes its input.

    The constructor makes a layer without a weight; `from_linear` makes one with the quantized
    weight of `linear`.

    Args:
        linear: the layer to replace.  Its bias is shared; its weight is only read.
        scheme: formats and observer.
        name: error messages call the layer by this name.

    Attributes:
        weight_scale, weight_quant_min: the weight's quantization parameters, one entry per block
            (see `primitives.QParams`).
        input_transform: a module that is applied to the input before quantization, or None.
        rounding: how the weight was rounded, as in `Scheme`.  It is `nearest` in a GPTQ scheme if
            no calibration token reached the layer.
        weight_error: |w^ - w|^2 / |w|^2; NaN in a model that was loaded.
        input_quantizer: the quantizer of the input; `nn.Identity` if the input is not quantized.
    """

    fixed_buffers = ("weight_scale", "weight_quant_min")
    weight_scale: Tensor
    weight_quant_min: Tensor

    def __init__(self, linear: nn.Linear, scheme: Scheme, *, name: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.scheme, self.rounding, self.weight_error = scheme, scheme.rounding, math.nan
        self.bias = linear.bias
        self.register_parameter("weight", None)
        self.input_transform: nn.Module | None = getattr(linear, "input_transform", None)
        self.input_quantizer: nn.Module = nn.Identity()
        if scheme.activation is not None and scheme.static:
            self.input_quantizer = StaticQuantizer(
                scheme.activation, observer=scheme.observer, name=f"{name}.input"
            )
        elif scheme.activation is not None:
            self.input_quantizer = DynamicQuantizer(
                scheme.activation, name=f"{name}.input", clip_ratio=scheme.clip_ratio
            )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: Scheme,
        qparams: QParams,
        *,
        name: str,
        gptq_weight: Tensor | None = None,
    ) -> QuantizedLinear:
        """A layer with the quantized weight of `linear`, rounded to nearest.

        `qparams` are those of the weight, see `weight_qparams`.  With `gptq_weight`, that weight is
        used; it must be representable with `qparams`.
        """
        self, weight = cls(linear, scheme, name=name), linear.weight.detach()
        self.rounding = "nearest" if gptq_weight is None else scheme.rounding
        blocks = to_blocks(weight if gptq_weight is None else gptq_weight, scheme.weight)
        rounded = fake_quantize(blocks, qparams, scheme.weight.element_type)
        rounded = rounded.reshape(weight.shape).contiguous()
        error, norm = (
            torch.linalg.vector_norm(x, dtype=torch.float64) for x in (rounded - weight, weight)
        )
        self.weight_error = float(error.square() / norm.square()) if norm else 0.0
        self.weight = nn.Parameter(rounded, linear.weight.requires_grad)
        self.register_buffer("weight_scale", qparams.scale)
        self.register_buffer("weight_quant_min", qparams.quant_min)
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight: outputs, inputs."""
        return self.out_features, self.in_features

    def allocate_codes(self) -> None:
        """Create the buffers that a checkpoint is loaded into: codes, scales and smallest codes."""
        # A placeholder weight: the `_init_weights` of some families reads it before loading.
        del self.weight
        self.register_buffer("weight", torch.empty(1, 1), persistent=False)
        blocks = to_blocks(torch.empty(self.shape, device="meta"), self.scheme.weight)
        for name in self.fixed_buffers:
            self.register_buffer(name, torch.empty_like(blocks[..., :1]))
        self.register_buffer(CODES, torch.empty(self.shape, dtype=torch.int8, device="meta"))

    def codes(self) -> Tensor:
        """The weight as int8 codes of the same shape.

        Integers are shifted so that they fit the signed range; floating-point numbers are stored as
        the bits of `e4m3`, which contains `e2m1`.

        Raises:
            UserError: no codes reproduce the weight exactly, because it was changed after
                quantization.
        """
        codes = self._encode(self.weight.detach())
        if codes is None:
            raise UserError("weight: it was changed after quantizing; quantize the model again")
        return codes

    def _encode(self, weight: Tensor) -> Tensor | None:
        """The codes of `weight`, which may be rounded to its dtype; None if it has no codes."""
        spec = self.scheme.weight
        code = round_codes(to_blocks(weight, spec) / self.weight_scale, spec.element_type)
        if spec.element_type == "int":
            half = 2 ** (spec.bits - 1)
            codes = (code - self._offset()).clamp_(-half, half - 1).to(torch.int8)
        else:
            top = FLOAT_TYPES[spec.element_type].largest
            codes = code.clamp_(-top, top).to(torch.float8_e4m3fn).view(torch.int8)
        codes = codes.view(weight.shape)
        return codes if torch.equal(self.decode(codes, weight.dtype), weight) else None

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight that `codes` represent, in `dtype`."""
        spec, dtype_of_scale = self.scheme.weight, self.weight_scale.dtype
        if spec.element_type == "int":
            code = to_blocks(codes.to(dtype_of_scale), spec) + self._offset()
        else:
            code = to_blocks(codes.view(torch.float8_e4m3fn).to(dtype_of_scale), spec)
        return (code * self.weight_scale).to(dtype).view(codes.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Compute the weight from its codes after a cast, so that repeated casts lose nothing."""
        before = self.weight.detach()
        super()._apply(fn, recurse)
        if self.weight.dtype != before.dtype:
            codes = self._encode(before.to(self.weight.device))
            if codes is not None:
                self.weight.data = self.decode(codes, self.weight.dtype)
        return self

    def _offset(self) -> Tensor:
        """The number that is subtracted from an integer code so that it fits int8."""
        return self.weight_quant_min + 2 ** (self.scheme.weight.bits - 1)

    def forward(self, input: Tensor) -> Tensor:
        if self.input_transform is not None:
            input = self.input_transform(input)
        return F.linear(self.input_quantizer(input), self.weight, self.bias)


def transform_input(linear: nn.Module, transform: nn.Module) -> None:
    """Apply `transform` to the input of a linear layer; it becomes the child `input_transform`."""
    linear.add_module("input_transform", transform)
    linear.register_forward_pre_hook(_transform_input)


def _transform_input(linear: nn.Module, args: tuple[Tensor]) -> Tensor:
    return cast(nn.Module, linear.input_transform)(args[0])


def replace_linear(model: PreTrainedModel, name: str, layer: nn.Module) -> None:
    """Replace the linear layer `name` by `layer`; an output head is untied from the embedding."""
    if model.get_submodule(name) is model.get_output_embeddings():
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
    model.set_submodule(name, layer)
