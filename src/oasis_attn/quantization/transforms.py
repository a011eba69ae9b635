"""Transforms of a linear layer's input before quantization; the weight contains the inverse."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oasis_attn.quantization.hadamard import hadamard, is_order

_LARGEST = 512


class Rotation(nn.Module):
    """Orthogonal transform x -> x (A^T kron B) that spreads each channel evenly over all channels.

    x [..., n] is reshaped to [a, b] with n = a b, and becomes A x B.  A and B are Hadamard matrices
    with random signs whose sizes are as similar as n allows.  Two small matrix products then do the
    same as a fast Walsh-Hadamard transform, in few passes over x.  If n is not a product of two
    Hadamard orders, A is a random orthogonal matrix whose size is the odd part of n, and channels
    are spread only approximately evenly over that part.  An x of k n channels is transformed in k
    groups of neighboring channels, each by the same matrices.

    Args:
        width: n.
        generator: random generator of the signs; torch's default generator if None.

    Attributes:
        left, right: A `[a, a]` and B `[b, b]`, created in float64.
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
        blocks = x.unflatten(-1, (-1, len(self.left), len(self.right)))
        return (self.left @ (blocks @ self.right)).flatten(-3)

    def extra_repr(self) -> str:
        return f"{len(self.left)} x {len(self.right)}"


def _factors(width: int) -> tuple[int, int]:
    """a, b with a b = width: two Hadamard orders, or else the odd part and the power of two."""
    pairs = [(a, width // a) for a in range(1, width + 1) if width % a == 0]
    known = [(a, b) for a, b in pairs if max(a, b) <= _LARGEST and is_order(a) and is_order(b)]
    if known:
        return min(known, key=sum)
    power = width & -width
    return width // power, power


class Scale(nn.Module):
    """x -> x / s for each channel; `inverse` is 1 / s, `[D]`."""

    inverse: Tensor

    def __init__(self, inverse: Tensor) -> None:
        super().__init__()
        self.register_buffer("inverse", inverse)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.inverse


class Dense(nn.Module):
    """x -> x T for any invertible matrix T; `matrix` is T, `[D, D]`."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix
