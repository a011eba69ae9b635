"""The private names of torch that the library uses, and nothing else of it.

A release of torch may change or remove them without notice.  No other module uses private names of
torch; `tests/modeling/test_private_names.py` checks that, and `tests/ops/test_torch_compat.py` each
name below.  They are bound when this module is imported, so that a call costs what a call of the
original costs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = [
    "allow_side_effects_in_checkpoints",
    "apply_to_tensors",
    "assert_async",
    "cudnn_attention",
    "cudnn_attention_backward",
    "dispatch_modes",
    "efficient_attention",
    "efficient_attention_backward",
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_for_cpu",
    "flash_attention_for_cpu_backward",
    "fused_sdp_choice",
    "replace_apply",
    "tensor_version",
    "tree_map_only",
]
# tree_map_only moves all tensors of a nested state to another device; without it, depth routing
# fails as soon as the layers of a model are on several devices.

dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many dispatch modes are active; without it, selective activation checkpointing fails where an
operation's result is changed in place."""

flash_attention_for_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
"""The only CPU kernel that returns the log-sum-exp; without it, no null probability on the CPU."""

flash_attention_for_cpu_backward = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
)
"""The gradient of `flash_attention_for_cpu`; without it, attention cannot be trained on the CPU."""

fused_sdp_choice = torch._fused_sdp_choice
"""The kernel that `scaled_dot_product_attention` selects; without it, attention on CUDA selects
another kernel than the stock model, and their rounding differs."""

flash_attention = torch.ops.aten._scaled_dot_product_flash_attention
"""Flash attention on CUDA with its log-sum-exp; without it, `cuda_flash` is slower."""

flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
"""The gradient of `flash_attention`; without it, `cuda_flash` cannot be trained."""

efficient_attention = torch.ops.aten._scaled_dot_product_efficient_attention
"""Memory-efficient attention on CUDA with its log-sum-exp; without it, `cuda_flash` supports
neither float32 nor masks."""

efficient_attention_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
"""The gradient of `efficient_attention`; without it, `cuda_flash` cannot be trained."""

cudnn_attention = torch.ops.aten._scaled_dot_product_cudnn_attention
"""cuDNN's attention on CUDA with its log-sum-exp; without it, `cuda_flash` is slower."""

cudnn_attention_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
"""The gradient of `cudnn_attention`; without it, `cuda_flash` cannot be trained."""

assert_async = torch._assert_async
"""Checks a tensor without waiting for the device, also in an exported graph, which drops
`torch._check`; without it, a compiled model mixes packed sequences when it has a cache."""

apply_to_tensors = nn.Module._apply
"""Casts and moves the tensors of a module; without it, a cast would round quantization grids."""


def replace_apply(
    module: nn.Module, function: Callable[[Callable[[Tensor], Tensor], bool], nn.Module]
) -> None:
    """Let every cast and move of this one module call `function(fn, recurse)`.

    Without it, casts of a quantized model would change buffers that loading computes again, so that
    the saved model would differ from the one in memory.
    """
    vars(module)["_apply"] = function


def allow_side_effects_in_checkpoints() -> None:
    """Let `torch.compile` accept checkpointed layers that change objects from outside.

    It does not repeat the change when it computes the layer again for the backward pass.  Without
    it, a compiled model with depth routing cannot be trained with activation checkpointing.
    """
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def tensor_version(tensor: Tensor) -> int:
    """How often `tensor` was changed in place; without it, `recompute_mixes` misses a change."""
    return tensor._version
