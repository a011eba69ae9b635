"""Depth routing for inference on the CPU: one call of C a sublayer, see `ops/native.c`.

Without a C compiler, `InferenceStream` takes its place.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from oasis_attn.modeling.residual import UNIT_EPS, Norm, Routing, evidence
from oasis_attn.ops import native

GROUP = 8
_SCALES = ("none", "sources", "unit")  # the numbers that native.c has for them
_SHARE = 16  # tokens that are worth a thread
_SPARE_BYTES = 256 << 20
_spare: list[Tensor] = []  # one at most


def suits_native(embedding_BTD: Tensor) -> bool:
    """Whether `NativeStream` can go through this state: float32 on the CPU, in whole vectors."""
    return (
        embedding_BTD.dtype == torch.float32
        and embedding_BTD.shape[-1] % native.LANES == 0
        and embedding_BTD.device.type == "cpu"
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and native.library() is not None
    )


class NativeStream:
    """Does what `DepthStream` does; layers hand on this object itself, beside the hidden state."""

    def __init__(self, embedding_BTD: Tensor, routing: Routing):
        settings = routing.router.settings
        library = native.library()
        assert library is not None
        self._step = library.depth_step
        D, N = embedding_BTD.shape[-1], embedding_BTD.shape[:-1].numel()
        R, block = len(routing.queries_RD), settings.depth_block_size
        S, group = 1 + (R + block - 2) // block, min(block if block > 1 else GROUP, R)
        G = -(-group // native.TILE) * native.TILE
        self._queries_RD = F.pad(routing.queries_RD, (0, 0, 0, native.TILE)).float()
        couplings_R = routing.couplings_R
        self._couplings_R = None if couplings_R is None else couplings_R.float()
        sizes = S * N * D, S * N, S * N, N, G * N * D, G * N, G * N
        self._memory = _allocate(sum(sizes))
        buffers = [buffer.data_ptr() for buffer in self._memory[: sum(sizes)].split(sizes)]
        self._state = native.DepthState(
            N, D, R, block, group,
            settings.depth_normalizer == "softmax1", _SCALES.index(settings.depth_scale),
            routing.router.eps, UNIT_EPS,
            self._queries_RD.data_ptr(), _pointer(self._couplings_R), *buffers,
        )  # fmt: skip
        self._address = ctypes.addressof(self._state)
        self._shape, self._tokens, self._router, self._last = embedding_BTD.shape, N, 0, R - 1
        self._null_BHT: Tensor | None = None  # of the sublayer before, and its psi
        self._psi_BT: Tensor | None = None
        self._mix(embedding_BTD, None, 1)

    def read(self, norm: Norm) -> Tensor:
        return norm(self.hidden)

    def add(self, branch_BTD: Tensor, null_BHT: Tensor | None) -> None:
        """See `DepthStream.add`."""
        self._router += 1
        if self._couplings_R is None or null_BHT is None:
            self._mix(branch_BTD, None, 1)
        elif branch_BTD.shape[1] == 1:  # [B, H, 1] is [N, H]
            self._mix(branch_BTD, null_BHT, null_BHT.shape[1])
        else:
            if null_BHT is not self._null_BHT:  # an MLP has its attention's
                self._null_BHT = null_BHT
                self._psi_BT = evidence(null_BHT, branch_BTD)
            self._mix(branch_BTD, self._psi_BT, 1)

    def packed(self) -> Tensor | tuple[Tensor, NativeStream]:
        return self.hidden if self._router == self._last else (self.hidden, self)

    def resume(self, hidden: Tensor) -> NativeStream:
        """Go on in the next layer."""
        self.hidden = hidden
        return self

    def _mix(self, branch_BTD: Tensor, null_NH: Tensor | None, heads: int) -> None:
        if branch_BTD.shape != self._shape or self._router > self._last:  # C would go astray
            raise ValueError(
                f"sublayer {self._router} of {self._last} gave {list(branch_BTD.shape)}, "
                f"the embedding is {list(self._shape)}"
            )
        # Under autocast a branch is in half precision, and the stream stays in float32.
        branch_BTD = branch_BTD.float().contiguous()
        null_NH = None if null_NH is None else null_NH.float().contiguous()
        self.hidden = torch.empty_like(branch_BTD)
        arguments = (
            *(self._address, self._router, branch_BTD.data_ptr()),
            *(_pointer(null_NH), heads, self.hidden.data_ptr()),
        )
        self._run(arguments)
        if self._router == self._last and self._memory.nbytes <= _SPARE_BYTES:
            _spare[:] = [self._memory]

    def _run(self, arguments: tuple) -> None:
        threads = min(torch.get_num_threads(), self._tokens // _SHARE)
        if threads <= 1:
            self._step(*arguments, 0, self._tokens)
            return
        bounds = [self._tokens * thread // threads for thread in range(threads + 1)]
        list(_pool(threads).map(partial(self._step, *arguments), bounds[:-1], bounds[1:]))


def _allocate(size: int) -> Tensor:
    """`[at least size]` of float32, by choice what the pass before used.

    The memory of a prompt's sources would go back to the system after each pass, and to get it
    anew, a page at a time, cost a tenth of the pass.
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
    """Calls of C run beside each other: ctypes lets go of Python's lock."""
    return ThreadPoolExecutor(threads)


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
