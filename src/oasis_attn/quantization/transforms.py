"""What runs on a linear layer's input before it is quantised, its inverse being in the weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oasis_attn.quantization.hadamard import hadamard, is_order

_LARGEST = 512


class Rotation(nn.Module):
    """x -> x (A^T kron B), orthogonal: spreads every channel evenly over all of them.

    x [..., n] is seen as [a, b], n = a b, and becomes A x B.  A and B are randomly signed Hadamard
    matrices, as nearly square as n allows, so that two small matrix products do what a fast
    Walsh-Hadamard transform does, in a few passes over x.  Where n has no such pair, A is a random
    orthogonal matrix of the size of its odd part, and the spread over that part only roughly even.

    Args:
        width: n.
        generator: draws the signs; the default one of torch if None.

    Attributes:
        left, right: A `[a, a]` and B `[b, b]`, float64 until `to` says otherwise.
    """

    left: Tensor
    right: Tensor

    def __init__(self, width: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        for name, size in zip(("left", "right"), _factors(width), strict=True):
            if is_order(size):
                signs = torch.randint(2, (size,), generator=generator) * 2.0 - 1
                factor = hadamard(size).to(signs.device) * signs * size**-0.5
            else:
                factor = torch.randn(size, size, generator=generator, dtype=torch.float64)
                factor = torch.linalg.qr(factor).Q
            self.register_buffer(name, factor if name == "left" else factor.T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (len(self.left), len(self.right)))
        return (self.left @ (blocks @ self.right)).flatten(-2)

    def extra_repr(self) -> str:
        return f"{len(self.left)} x {len(self.right)}"


def _factors(width: int) -> tuple[int, int]:
    """a, b with a b = width: Hadamard orders, or else a the odd part."""
    pairs = [(a, width // a) for a in range(1, width + 1) if width % a == 0]
    known = [(a, b) for a, b in pairs if max(a, b) <= _LARGEST and is_order(a) and is_order(b)]
    if known:
        return min(known, key=sum)
    power = width & -width
    return width // power, power


class Scale(nn.Module):
    """x -> x / s, channel by channel; `inverse` is 1 / s, `[D]`."""

    inverse: Tensor

    def __init__(self, inverse: Tensor) -> None:
        super().__init__()
        self.register_buffer("inverse", inverse)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.inverse
