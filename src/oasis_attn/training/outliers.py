"""A regulariser against what breaks static quantisation: tokens far above all others."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

_FLOOR = 1e-12  # of a mean square


class _LogPeak(torch.autograd.Function):
    """`log_peak`, keeping nothing but x and what is of its shape without tokens or width."""

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
    """log of a sequence's largest mean square of a token over that of all its tokens, `[B]`.

    0 where all T tokens are of one size, log T where one holds everything: how far a single token
    stretches the range that static quantisation gives to all.  It does not depend on the scale of
    x, so that no weight decay can serve it.
    """
    return _LogPeak.apply(x_BTD)


class OutlierPenalty:
    """Mean `log_peak` of what the linear maps of a model's decoder read.

    These are the tensors that static quantisation gives one range each.  A tensor read by several
    maps counts once; the head, LoRA's own maps and experts, which see no sequence, do not count.
    """

    def __init__(self, model: PreTrainedModel):
        self._found: list[Tensor] | None = None
        self._last: Callable[[], Tensor | None] = lambda: None
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name:
                module.register_forward_pre_hook(self._read)

    @contextmanager
    def collected(self) -> Iterator[list[Tensor]]:
        """While open, forward passes append one `[B]` per tensor to the list yielded."""
        found: list[Tensor] = []
        self._found = found
        try:
            yield found
        finally:
            self._found = None

    def _read(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_BTD = inputs[0]
        # Not only while collecting: a recomputation must do what the forward pass did.
        if not torch.is_grad_enabled() or x_BTD.dim() != 3 or x_BTD is self._last():
            return
        self._last = weakref.ref(x_BTD)
        peak_B = log_peak(x_BTD)
        if self._found is not None:
            self._found.append(peak_B)
