"""Hadamard matrices: entries +-1 and orthogonal rows (constructions of Paley and Sylvester)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def is_order(n: int) -> bool:
    """Whether `hadamard(n)` exists: n is 1, 2, q + 1 or 2 (q + 1) for a prime q, times 2^k."""
    return n in (1, 2) or _paley_prime(n) > 0 or (n % 2 == 0 and is_order(n // 2))


@cache
def hadamard(n: int) -> Tensor:
    """A Hadamard matrix H, `[n, n]` float64: H H^T = n; `ValueError` unless `is_order(n)`.

    It is always on the CPU, whatever the default device is, because it is cached.
    """
    with torch.device("cpu"):
        return _matrix(n)


def _matrix(n: int) -> Tensor:
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = _paley_prime(n)
    if q == n - 1:
        return torch.eye(n, dtype=torch.float64) + _bordered(q, -1)
    small = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if q:
        symmetric, eye = _bordered(q, 1), torch.eye(q + 1, dtype=torch.float64)
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(symmetric, small) + torch.kron(eye, other)
    if not is_order(n):
        raise ValueError(f"no construction of a Hadamard matrix of order {n}")
    return torch.kron(small, _matrix(n // 2))


def _bordered(q: int, sign: int) -> Tensor:
    """S `[q + 1, q + 1]`: the Jacobsthal matrix (quadratic characters) with a border of ones."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(1, q) ** 2 % q] = 1.0
    character[0] = 0.0
    index = torch.arange(q)
    bordered = torch.ones(q + 1, q + 1, dtype=torch.float64)
    bordered[1:, 1:] = character[(index[:, None] - index) % q]
    bordered[1:, 0] = sign
    bordered[0, 0] = 0.0
    return bordered


def _paley_prime(n: int) -> int:
    """The prime q of the Paley construction of order n; 0 if there is none."""
    if n % 4 == 0 and _is_prime(n - 1):  # q = 3 mod 4
        return n - 1
    half = n // 2
    return half - 1 if n % 4 == 0 and half % 4 == 2 and _is_prime(half - 1) else 0


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % factor for factor in range(2, int(q**0.5) + 1))
