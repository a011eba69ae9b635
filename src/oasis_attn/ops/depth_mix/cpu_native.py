"""Mixes over depth for inference on the CPU: one call of C a sublayer, see `ops/native.c`.

Without a C compiler, `TwoPhaseMix` takes its place.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oasis_attn.ops import native
from oasis_attn.ops.depth_mix.routers import RMS_EPS, Routers

GROUP = 8
_SCALES = ("none", "sum", "rms")  # the numbers that native.c has for them
_TOKENS_PER_THREAD = 16  # fewer are not worth a thread
_SPARE_BYTES = 256 << 20
_spare: list[Tensor] = []  # one at most


def can_use_native(embedding_BTD: Tensor) -> bool:
    """Whether `NativeMix` can be used: float32 on the CPU, in whole vectors, and compiled."""
    return (
        embedding_BTD.dtype == torch.float32
        and embedding_BTD.shape[-1] % native.LANES == 0
        and embedding_BTD.device.type == "cpu"
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and native.library() is not None
    )


class NativeMix:
    """Every router's mix in turn; it computes what `TwoPhaseMix` does."""

    def __init__(self, embedding_BTD: Tensor, routers: Routers):
        library = native.library()
        assert library is not None
        self._step = library.depth_step
        D, N = embedding_BTD.shape[-1], embedding_BTD.shape[:-1].numel()
        R, block = len(routers.queries_RD), routers.block_size
        S, group = 1 + (R + block - 2) // block, min(block if block > 1 else GROUP, R)
        G = -(-group // native.TILE) * native.TILE
        self._queries_RD = F.pad(routers.queries_RD, (0, 0, 0, native.TILE)).float()
        self._beta_R = None if routers.beta_R is None else routers.beta_R.float()
        sizes = S * N * D, S * N, S * N, N, G * N * D, G * N, G * N
        self._memory = _allocate(sum(sizes))
        buffers = [buffer.data_ptr() for buffer in self._memory[: sum(sizes)].split(sizes)]
        self._state = native.DepthState(
            N, D, R, block, group,
            routers.normalizer == "softmax1", _SCALES.index(routers.mix_scale),
            routers.eps, RMS_EPS,
            self._queries_RD.data_ptr(), _pointer(self._beta_R), *buffers,
        )  # fmt: skip
        self._address = ctypes.addressof(self._state)
        self._shape, self._tokens, self._last = embedding_BTD.shape, N, R - 1

    def update(self, branch_BTD: Tensor, psi_BT: Tensor | None, sublayer: int) -> Tensor:
        """See `AutogradMix.update`."""
        if branch_BTD.shape != self._shape or sublayer > self._last:  # C would go astray
            raise ValueError(
                f"sublayer {sublayer} of {self._last} gave {list(branch_BTD.shape)}, "
                f"the embedding is {list(self._shape)}"
            )
        branch_BTD, mixed_BTD = _plain(branch_BTD), torch.empty(self._shape)
        psi_BT = None if psi_BT is None else _plain(psi_BT)
        arguments = (
            *(self._address, sublayer, branch_BTD.data_ptr()),
            *(_pointer(psi_BT), mixed_BTD.data_ptr()),
        )
        self._run(arguments)
        if sublayer == self._last and self._memory.nbytes <= _SPARE_BYTES:
            _spare[:] = [self._memory]
        return mixed_BTD

    def to(self, device: torch.device) -> None:
        """Refused: what is in C's memory stays on the CPU, where `can_use_native` found all."""
        raise ValueError(f"device: {device} is not the CPU")

    def _run(self, arguments: tuple[Any, ...]) -> None:
        threads = min(torch.get_num_threads(), self._tokens // _TOKENS_PER_THREAD)
        if threads <= 1:
            self._step(*arguments, 0, self._tokens)
            return
        bounds = [self._tokens * thread // threads for thread in range(threads + 1)]
        list(_pool(threads).map(partial(self._step, *arguments), bounds[:-1], bounds[1:]))


def _plain(tensor: Tensor) -> Tensor:
    """In float32 and in one piece; under autocast a branch is in half precision."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.float().contiguous()


def _allocate(size: int) -> Tensor:
    """`[at least size]` of float32, if possible the memory that the pass before used.

    The memory of a prompt's sources would go back to the system after each pass, and to get it
    anew, a page at a time, took a tenth of the pass.
    """
    try:
        memory = _spare.pop()
    except IndexError:
        return torch.empty(size, dtype=torch.float32)
    return memory if memory.numel() >= size else torch.empty(size, dtype=torch.float32)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that call C at the same time: ctypes releases Python's lock."""
    return ThreadPoolExecutor(threads)


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
