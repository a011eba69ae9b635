"""Mixes over depth without gradients on a CPU, with one call of a C kernel per router.

The kernel is `depth_step` in `ops/c_kernels.c`.  Without a C compiler, `TwoPhaseMixer` is used.
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

from oasis_attn.ops import c_kernels
from oasis_attn.ops.depth_mix.routers import RMS_EPS, Routers

_SCALES = ("none", "sum", "rms")  # an index in this tuple is `DepthState.scale` in c_kernels.c
_TOKENS_PER_THREAD = 16  # for fewer, starting a thread takes longer than it saves
_SPARE_BYTES = 256 << 20
_spare: list[Tensor] = []  # the memory of the previous forward pass: at most one tensor


def can_use_c_mixer(embedding_BTD: Tensor) -> bool:
    """Whether `CMixer` supports this embedding.

    It needs float32 on the CPU, a width that is a multiple of `c_kernels.LANES`, no tracing, and
    compiled kernels.
    """
    return (
        embedding_BTD.dtype == torch.float32
        and embedding_BTD.shape[-1] % c_kernels.LANES == 0
        and embedding_BTD.device.type == "cpu"
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and c_kernels.library() is not None
    )


class CMixer:
    """Computes the mix of each router in turn, by the same method as `TwoPhaseMixer`."""

    def __init__(self, embedding_BTD: Tensor, routers: Routers):
        library = c_kernels.library()
        assert library is not None
        self._step = library.depth_step
        D, N = embedding_BTD.shape[-1], embedding_BTD.shape[:-1].numel()
        R, block = len(routers.queries_RD), routers.block_size
        S, group = routers.newest_source(R - 1)[0] + 1, min(routers.group_size, R)
        G = -(-group // c_kernels.TILE) * c_kernels.TILE
        self._queries_RD = F.pad(routers.queries_RD, (0, 0, 0, c_kernels.TILE)).float()
        self._beta_R = None if routers.beta_R is None else routers.beta_R.float()
        sizes = S * N * D, S * N, S * N, N, G * N * D, G * N, G * N
        self._memory = _allocate(sum(sizes))
        buffers = [buffer.data_ptr() for buffer in self._memory[: sum(sizes)].split(sizes)]
        self._state = c_kernels.DepthState(
            N, D, R, block, group,
            routers.normalizer == "softmax1", _SCALES.index(routers.mix_scale),
            routers.eps, RMS_EPS,
            self._queries_RD.data_ptr(), _pointer(self._beta_R), *buffers,
        )  # fmt: skip
        self._address = ctypes.addressof(self._state)
        self._shape, self._tokens, self._last = embedding_BTD.shape, N, R - 1

    def update(self, branch_BTD: Tensor, psi_BT: Tensor | None, router: int) -> Tensor:
        """See `Mixer.update`."""
        if branch_BTD.shape != self._shape or router > self._last:  # C does not check its bounds
            raise ValueError(
                f"router {router} (of 0 to {self._last}): the branch is {list(branch_BTD.shape)},"
                f" the embedding is {list(self._shape)}"
            )
        branch_BTD, mixed_BTD = _plain(branch_BTD), torch.empty(self._shape)
        psi_BT = None if psi_BT is None else _plain(psi_BT)
        arguments = (
            *(self._address, router, branch_BTD.data_ptr()),
            *(_pointer(psi_BT), mixed_BTD.data_ptr()),
        )
        self._run(arguments)
        if router == self._last and self._memory.nbytes <= _SPARE_BYTES:
            _spare[:] = [self._memory]
        return mixed_BTD

    def to(self, device: torch.device) -> None:
        """Raises `ValueError`: the state is memory of the CPU that C kernels address."""
        raise ValueError(f"device: {device} is not the CPU")

    def _run(self, arguments: tuple[Any, ...]) -> None:
        threads = min(torch.get_num_threads(), self._tokens // _TOKENS_PER_THREAD)
        if threads <= 1:
            self._step(*arguments, 0, self._tokens)
            return
        bounds = [self._tokens * thread // threads for thread in range(threads + 1)]
        list(_pool(threads).map(partial(self._step, *arguments), bounds[:-1], bounds[1:]))


def _plain(tensor: Tensor) -> Tensor:
    """`tensor` in contiguous float32; under autocast a branch has a 16-bit dtype."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.float().contiguous()


def _allocate(size: int) -> Tensor:
    """A float32 tensor of at least `size` elements: the memory of the previous pass, if possible.

    Without this, the memory for the sources of a prompt would be returned to the system after each
    pass; to receive it again, page by page, took a tenth of the time of the pass.
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
    """Threads that call C in parallel: ctypes releases the global interpreter lock."""
    return ThreadPoolExecutor(threads)


if hasattr(os, "register_at_fork"):  # a forked process has no threads of its parent
    os.register_at_fork(after_in_child=_pool.cache_clear)
