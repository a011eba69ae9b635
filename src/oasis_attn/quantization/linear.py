"""A linear layer on a grid, and its form on disk: whole numbers and scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.quantization.casts import KeepsPrecision
from oasis_attn.quantization.grids import snap, to_blocks
from oasis_attn.quantization.quantizers import DynamicQuantizer, StaticQuantizer, find_levels
from oasis_attn.quantization.saved import CODES
from oasis_attn.quantization.schemes import Scheme


class QuantizedLinear(KeepsPrecision, nn.Linear):
    """A linear layer whose weight lies on a grid and whose input is quantised on its way in.

    Args:
        linear: the layer it stands for; its bias is shared, its weight is read and left alone.
        scheme: grids and estimator.
        site: how error messages call the layer.

    Attributes:
        weight_scale, weight_lowest: the weight's grid, one entry per block (see `grids.Levels`).
        input_transform: runs on the input before its quantiser; None where nothing does.
        rounding: of the weight, as in `Scheme`; `nearest` too where GPTQ had no tokens to go by.
        weight_error: |w^ - w|^2 / |w|^2 of the rounding; NaN in a model that was loaded.
        input_quantizer: the input's, `nn.Identity` where it is left as it is.
    """

    kept = ("weight_scale", "weight_lowest")
    weight_scale: Tensor
    weight_lowest: Tensor

    def __init__(self, linear: nn.Linear, scheme: Scheme, *, site: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.scheme, self.rounding, self.weight_error = scheme, scheme.rounding, math.nan
        self.bias = linear.bias
        self.register_parameter("weight", None)
        self.input_transform: nn.Module | None = getattr(linear, "input_transform", None)
        self.input_quantizer: nn.Module = nn.Identity()
        if scheme.activation is not None and scheme.static:
            self.input_quantizer = StaticQuantizer(
                scheme.activation, estimator=scheme.estimator, site=f"{site}.input"
            )
        elif scheme.activation is not None:
            self.input_quantizer = DynamicQuantizer(scheme.activation, site=f"{site}.input")

    @classmethod
    def rounded(
        cls, linear: nn.Linear, scheme: Scheme, *, site: str, weight: Tensor | None = None
    ) -> QuantizedLinear:
        """With the linear layer's weight, or another on its grid, moved to the nearest levels."""
        self, own, name = cls(linear, scheme, site=site), linear.weight.detach(), f"{site}.weight"
        self.rounding = "nearest" if weight is None else scheme.rounding
        levels = find_levels(own, scheme.weight, estimator=scheme.estimator, site=name)
        blocks = to_blocks(own if weight is None else weight, scheme.weight, name)
        rounded = snap(blocks, levels).reshape(own.shape).contiguous()
        moved, size = (
            torch.linalg.vector_norm(x, dtype=torch.float64) for x in (rounded - own, own)
        )
        self.weight_error = float(moved.square() / size.square()) if size else 0.0
        self.weight = nn.Parameter(rounded, linear.weight.requires_grad)
        self.register_buffer("weight_scale", levels.scale)
        self.register_buffer("weight_lowest", levels.lowest)
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: outputs, inputs."""
        return self.out_features, self.in_features

    def lay_out(self) -> None:
        """Make room for the codes and the grids that a file holds."""
        # Until there are codes to decode: some families' `_init_weights` reads it before that.
        del self.weight
        self.register_buffer("weight", torch.empty(1, 1), persistent=False)
        blocks = to_blocks(torch.empty(self.shape, device="meta"), self.scheme.weight)
        for name in self.kept:
            self.register_buffer(name, torch.empty_like(blocks[..., :1]))
        self.register_buffer(CODES, torch.empty(self.shape, dtype=torch.int8, device="meta"))

    def codes(self) -> Tensor:
        """The weight as int8 of its shape: levels counted from the middle of the grid.

        Raises:
            UserError: no codes give the weight bit for bit; it was changed after quantising.
        """
        codes = self._encode(self.weight.detach())
        if codes is None:
            raise UserError("weight: it was changed after quantising; quantise the model again")
        return codes

    def _encode(self, weight: Tensor) -> Tensor | None:
        """The codes of `weight`, which is rounded to its dtype; None if it is on no levels."""
        half = 2 ** (self.scheme.weight.bits - 1)
        level = (to_blocks(weight, self.scheme.weight) / self.weight_scale).round_()
        codes = (level - self._middle()).clamp_(-half, half - 1).to(torch.int8).view(weight.shape)
        return codes if torch.equal(self.decode(codes, weight.dtype), weight) else None

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight that `codes` came from, bit for bit, in `dtype`."""
        blocks = to_blocks(codes.to(self.weight_scale.dtype), self.scheme.weight)
        return ((blocks + self._middle()) * self.weight_scale).to(dtype).view(codes.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """A cast rounds the weight that the codes stand for, whatever an earlier cast rounded."""
        before = None if self.weight is None else self.weight.detach()
        super()._apply(fn, recurse)
        if before is not None and self.weight.dtype != before.dtype:
            codes = self._encode(before.to(self.weight.device))
            if codes is not None:
                self.weight.data = self.decode(codes, self.weight.dtype)
        return self

    def _middle(self) -> Tensor:
        return self.weight_lowest + 2 ** (self.scheme.weight.bits - 1)

    def forward(self, input: Tensor) -> Tensor:
        if self.input_transform is not None:
            input = self.input_transform(input)
        return F.linear(self.input_quantizer(input), self.weight, self.bias)


def transform_input(linear: nn.Module, transform: nn.Module) -> None:
    """Let a linear layer read its input through `transform`, its child `input_transform`."""
    linear.add_module("input_transform", transform)
    linear.register_forward_pre_hook(_transform_input)


def _transform_input(linear: nn.Module, args: tuple[Tensor]) -> Tensor:
    return cast(nn.Module, linear.input_transform)(args[0])


def replace_linear(model: PreTrainedModel, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the linear layer `name`; a head is untied from the embedding."""
    if model.get_submodule(name) is model.get_output_embeddings():
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
    model.set_submodule(name, layer)
