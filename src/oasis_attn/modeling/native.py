"""Depth routing for inference on the CPU: one call of C a sublayer, see `ops/native.c`.

Without a C compiler, `InferenceStream` takes its place.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from oasis_attn.modeling.residual import Norm, Routing, evidence
from oasis_attn.ops import native

GROUP = 8
_SHARE = 16  # tokens that are worth a thread


def suits_native(embedding_BTD: Tensor, routing: Routing) -> bool:
    """Whether `NativeStream` can go through this state: float32 on the CPU, in whole vectors."""
    return (
        embedding_BTD.dtype == torch.float32
        and embedding_BTD.shape[-1] % native.LANES == 0
        and embedding_BTD.device.type == "cpu"
        and routing.router.settings.null_signal != "shuffled"
        and not torch.compiler.is_compiling()
        and native.library() is not None
    )


class NativeStream:
    """Does what `DepthStream` does; layers hand on this object itself, beside the hidden state."""

    def __init__(self, embedding_BTD: Tensor, routing: Routing):
        settings = self._settings = routing.router.settings
        library = native.library()
        assert library is not None
        self._step = library.depth_step
        D, N = embedding_BTD.shape[-1], embedding_BTD.shape[:-1].numel()
        R, block = len(routing.queries_RD), settings.depth_block_size
        S, group = 1 + (R + block - 2) // block, block if block > 1 else GROUP
        G = -(-group // native.TILE) * native.TILE
        self._queries_RD = F.pad(routing.queries_RD, (0, 0, 0, native.TILE))
        self._couplings_R = routing.couplings_R
        self._addresses = (ctypes.c_void_p * S)()
        sizes = S * N, S * N, N, G * N * D, G * N, G * N
        self._buffers = [embedding_BTD.new_empty(size) for size in sizes]
        self._state = native.DepthState(
            N, D, R, block, group,
            settings.depth_normalizer == "softmax1", settings.depth_scale == "sources",
            routing.router.eps, self._queries_RD.data_ptr(), _pointer(self._couplings_R),
            ctypes.addressof(self._addresses), *(buffer.data_ptr() for buffer in self._buffers),
        )  # fmt: skip
        self._address = ctypes.addressof(self._state)
        self._tokens, self._block, self._router, self._last = N, block, 0, R - 1
        self._sources: list[Tensor] = []
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
                self._psi_BT = evidence(null_BHT, branch_BTD, self._settings)
            self._mix(branch_BTD, self._psi_BT, 1)

    def packed(self) -> Tensor | tuple[Tensor, NativeStream]:
        return self.hidden if self._router == self._last else (self.hidden, self)

    def resume(self, hidden: Tensor) -> NativeStream:
        """Go on in the next layer."""
        self.hidden = hidden
        return self

    def _mix(self, branch_BTD: Tensor, null_NH: Tensor | None, heads: int) -> None:
        branch_BTD = branch_BTD.contiguous()
        if null_NH is not None:
            null_NH = null_NH.contiguous()
        running = None
        members = (self._router - 1) % self._block if self._router else 0
        if members == 0:
            self._sources.append(branch_BTD)
        else:
            running = self._sources[-1]
            if members == 1:  # what runs is a branch, and not ours to change
                self._sources[-1] = torch.empty_like(branch_BTD)
        self._addresses[len(self._sources) - 1] = self._sources[-1].data_ptr()
        self.hidden = torch.empty_like(branch_BTD)
        arguments = (
            *(self._address, self._router, branch_BTD.data_ptr(), _pointer(running)),
            *(_pointer(null_NH), heads, self.hidden.data_ptr()),
        )
        threads = min(torch.get_num_threads(), self._tokens // _SHARE)
        if threads <= 1:
            self._step(*arguments, 0, self._tokens)
            return
        bounds = [self._tokens * thread // threads for thread in range(threads + 1)]
        list(_pool(threads).map(partial(self._step, *arguments), bounds[:-1], bounds[1:]))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Calls of C run beside each other: ctypes lets go of Python's lock."""
    return ThreadPoolExecutor(threads)
