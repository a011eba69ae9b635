"""A regularizer against outlier tokens, which make static quantization inaccurate."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from oasis_attn.modeling.decoder_map import decoder_map

_FLOOR = 1e-12  # smallest mean square


class _LogPeak(torch.autograd.Function):
    """`log_peak` as an autograd function that saves only x and tensors of shape [B]."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor) -> Tensor:
        precise = torch.promote_types(x_BTD.dtype, torch.float32)
        energy_BT = x_BTD.to(precise).square().mean(-1)
        peak_B, token_B = energy_BT.clamp(min=_FLOOR).max(-1)
        mean_B = energy_BT.mean(-1).clamp(min=_FLOOR)
        ctx.save_for_backward(x_BTD, peak_B, token_B, mean_B)
        return torch.log(peak_B) - torch.log(mean_B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> Tensor:
        x_BTD, peak_B, token_B, mean_B = ctx.saved_tensors
        B, T, D = x_BTD.shape
        slope_BT = (-2 * grad_B / (mean_B * T * D)).unsqueeze(-1).repeat(1, T)
        slope_BT[torch.arange(B, device=x_BTD.device), token_B] += 2 * grad_B / (peak_B * D)
        return (x_BTD.to(slope_BT.dtype) * slope_BT.unsqueeze(-1)).to(x_BTD.dtype)


def log_peak(x_BTD: Tensor) -> Tensor:
    """log(largest mean square of a token / mean square of all tokens) of each sequence, `[B]`.

    It is 0 if all T tokens have the same norm, and log T if only one is not zero.  So it measures
    how much a single token extends the range that static quantization uses for all tokens.  It does
    not depend on the scale of x, so that smaller weights do not reduce it.
    """
    return _LogPeak.apply(x_BTD)


class OutlierPenalty:
    """Mean `log_peak` of tensors of a model's decoder.

    Args:
        model: the model; its forward passes are observed from now on.
        tensors: `linear_inputs`, the inputs of linear layers, for each of which static quantization
            uses one range.  An input of several layers counts once.  The head, the layers of LoRA,
            and experts, whose inputs are not sequences, do not count.  Or `layer_outputs`, the
            outputs of decoder layers: massive activations are largest there, and norms remove them
            from most inputs of linear layers.
    """

    def __init__(self, model: PreTrainedModel, tensors: str = "linear_inputs"):
        self._found: list[Tensor] | None = None
        self._last: Callable[[], Tensor | None] = lambda: None
        if tensors == "layer_outputs":
            for layer in decoder_map(model).layers:
                layer.module.register_forward_hook(self._read_output)
            return
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name:
                module.register_forward_pre_hook(self._read)

    @contextmanager
    def collect(self) -> Iterator[list[Tensor]]:
        """Context in which forward passes append `log_peak` of each tensor to the yielded list."""
        found: list[Tensor] = []
        self._found = found
        try:
            yield found
        finally:
            self._found = None

    def _read_output(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        self._read(module, output if isinstance(output, tuple) else (output,))

    def _read(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_BTD = inputs[0]
        # Also outside of `collect`: checkpointing must recompute what the forward pass computed.
        if not torch.is_grad_enabled() or x_BTD.dim() != 3 or x_BTD is self._last():
            return
        self._last = weakref.ref(x_BTD)
        peak_B = log_peak(x_BTD)
        if self._found is not None:
            self._found.append(peak_B)
