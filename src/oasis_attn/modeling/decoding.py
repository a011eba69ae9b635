"""Depth routing while decoding on the CPU: one call a sublayer.

A decoded token's sources are a few kilobytes, so that `InferenceStream` spends its time on calling
operations and not in them.  Here they are one function of C, `decoding.c`.  It is compiled when
first needed, into the cache folder; without a C compiler, `InferenceStream` decodes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from oasis_attn.files import cache_folder, write_bytes
from oasis_attn.modeling.residual import Norm, Routing
from oasis_attn.records import machine

_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-shared", "-fPIC")


class _State(ctypes.Structure):
    """`State` of decoding.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "H", "D", "S", "block", "null", "scaled")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("queries_RD", "couplings_R")),
        *((name, ctypes.c_void_p) for name in ("sources_BSD", "inverse_rms_BS", "psi_BS")),
        ("weights_S", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("router", "row")),
    ]


@cache
def _library() -> ctypes.CDLL | None:
    """decoding.c for this processor; None where it cannot be compiled."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        return None
    source = files("oasis_attn.modeling").joinpath("decoding.c").read_bytes()
    key = hashlib.sha256(repr((source, _FLAGS, compiler, machine()["device"])).encode()).hexdigest()
    built = cache_folder() / f"decoding-{key[:16]}.so"
    try:
        if not built.exists():
            with tempfile.TemporaryDirectory() as folder:
                path, out = Path(folder, "decoding.c"), Path(folder, "decoding.so")
                path.write_bytes(source)
                command = [compiler, *_FLAGS, str(path), "-o", str(out), "-lm"]
                subprocess.run(command, check=True, capture_output=True)
                write_bytes(built, out.read_bytes())
        library = ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError):
        return None
    library.depth_step.argtypes = [ctypes.c_void_p] * 4
    library.depth_step.restype = None
    return library


def decodable(embedding_BTD: Tensor, routing: Routing) -> bool:
    """Whether `DecodingStream` can go through this state: one float32 token a sequence, on CPU."""
    return (
        embedding_BTD.shape[1] == 1
        and embedding_BTD.dtype == torch.float32
        and embedding_BTD.device.type == "cpu"
        and routing.router.settings.null_signal != "shuffled"
        and not torch.compiler.is_compiling()
        and _library() is not None
    )


class DecodingStream:
    """Does what `DepthStream` does; layers hand on this object itself, beside the hidden state."""

    def __init__(self, embedding_BTD: Tensor, routing: Routing):
        settings = routing.router.settings
        library = _library()
        assert library is not None
        self._step = library.depth_step
        self._queries_RD = routing.queries_RD.contiguous()
        self._couplings_R = routing.couplings_R
        B, _, D = embedding_BTD.shape
        R = len(self._queries_RD)
        S = 1 + (R + settings.depth_block_size - 2) // settings.depth_block_size
        self._buffers = embedding_BTD.new_empty(B * S * D), *embedding_BTD.new_empty(3, B * S)
        signal = self._couplings_R is not None
        self._state = _State(
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
