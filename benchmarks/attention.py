"""Time and memory of null_attention, relative to SDPA and to its naive form."""

from __future__ import annotations

import json
import sys

import torch

from harness import in_new_process, medians, peak_memory
from oasis_attn.ops import null_attention


def inputs(T, batch=4, heads=8, width=64):
    torch.manual_seed(0)
    tensors = [torch.randn(batch, heads, T, width, requires_grad=True) for _ in range(3)]
    return tensors, torch.randn(batch, heads, T, width), torch.randn(batch, heads, T)


def step(kind, tensors, grad_out, grad_null):
    """Forward and backward; the null probability, if there is one, receives a gradient too."""
    for tensor in tensors:
        tensor.grad = None
    if kind == "sdpa":
        out = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)
        out.backward(grad_out)
    else:
        out_and_null = null_attention(*tensors, is_causal=True, backend=kind)
        torch.autograd.backward(out_and_null, (grad_out, grad_null))


def check() -> None:
    """Check the results before the speed is measured."""
    tensors, grad_out, grad_null = inputs(256, batch=1)
    gradients = []
    for kind in ("naive", "cpu_flash"):
        step(kind, tensors, grad_out, grad_null)
        gradients.append([tensor.grad for tensor in tensors])
    for naive, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, naive, rtol=1e-4, atol=1e-4)


def measure(rounds: int) -> dict[str, float]:
    check()
    arguments = inputs(2048)
    seconds = medians(
        {kind: lambda kind=kind: step(kind, *arguments) for kind in ("sdpa", "cpu_flash", "naive")},
        rounds,
    )
    memory = {
        (kind, T): in_new_process(__file__, kind, T)
        for kind in ("sdpa", "cpu_flash")
        for T in (256, 512, 1024, 2048, 4096, 8192)
    }
    return {
        "attention.time_over_sdpa": seconds["cpu_flash"] / seconds["sdpa"],
        "attention.speed_over_naive": seconds["naive"] / seconds["cpu_flash"],
        "attention.memory_over_sdpa": memory["cpu_flash", 2048] / memory["sdpa", 2048],
        **{
            f"attention.mebibytes@{T}": memory["cpu_flash", T] / 2**20
            for kind, T in memory
            if kind == "sdpa"
        },
    }


if __name__ == "__main__":
    kind, T = sys.argv[1], int(sys.argv[2])
    step(kind, *inputs(64))
    arguments = inputs(T)
    print(json.dumps(peak_memory(lambda: step(kind, *arguments))))
