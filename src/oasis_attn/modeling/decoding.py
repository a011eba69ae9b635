"""Depth routing while decoding on the CPU: one call of C a sublayer, see `ops.native`.

Without a C compiler, `InferenceStream` decodes.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from oasis_attn.modeling.residual import Norm, Routing
from oasis_attn.ops import native


def decodable(embedding_BTD: Tensor, routing: Routing) -> bool:
    """Whether `DecodingStream` can go through this state: one float32 token a sequence, on CPU."""
    return (
        embedding_BTD.shape[1] == 1
        and embedding_BTD.dtype == torch.float32
        and embedding_BTD.device.type == "cpu"
        and routing.router.settings.null_signal != "shuffled"
        and not torch.compiler.is_compiling()
        and native.library() is not None
    )


class DecodingStream:
    """Does what `DepthStream` does; layers hand on this object itself, beside the hidden state."""

    def __init__(self, embedding_BTD: Tensor, routing: Routing):
        settings = routing.router.settings
        library = native.library()
        assert library is not None
        self._step = library.depth_step
        self._queries_RD = routing.queries_RD.contiguous()
        self._couplings_R = routing.couplings_R
        B, _, D = embedding_BTD.shape
        R = len(self._queries_RD)
        S = 1 + (R + settings.depth_block_size - 2) // settings.depth_block_size
        self._buffers = embedding_BTD.new_empty(B * S * D), *embedding_BTD.new_empty(3, B * S)
        signal = self._couplings_R is not None
        self._state = native.DepthState(
            B, settings.num_attention_heads, D, S, settings.depth_block_size,
            settings.depth_normalizer == "softmax1", settings.depth_scale == "sources",
            routing.router.eps, self._queries_RD.data_ptr(),
            self._couplings_R.data_ptr() if self._couplings_R is not None else None,
            *(buffer.data_ptr() for buffer in self._buffers),
        )  # fmt: skip
        self._address = ctypes.addressof(self._state)
        self._signal, self._left = signal, R
        self.add(embedding_BTD, None)

    def read(self, norm: Norm) -> Tensor:
        return norm(self.hidden)

    def add(self, branch_BTD: Tensor, null_BHT: Tensor | None) -> None:
        """See `DepthStream.add`."""
        branch_BTD = branch_BTD.contiguous()
        null = None
        if self._signal and null_BHT is not None:
            null_BHT = null_BHT.contiguous()
            null = null_BHT.data_ptr()
        self.hidden = torch.empty_like(branch_BTD)
        self._step(self._address, branch_BTD.data_ptr(), null, self.hidden.data_ptr())
        self._left -= 1

    def packed(self) -> Tensor | tuple[Tensor, DecodingStream]:
        return (self.hidden, self) if self._left else self.hidden

    def resume(self, hidden: Tensor) -> DecodingStream:
        """Go on in the next layer."""
        self.hidden = hidden
        return self
