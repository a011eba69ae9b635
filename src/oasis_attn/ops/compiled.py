"""The compiled kernels that can be used: C on a CPU, and Triton on CUDA.

All other code finds them here.  Where a function returns None, PyTorch operations compute the same
results.  In the code that `hub.model_code` writes next to a model, every function returns None.

Axes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oasis_attn.ops import c_kernels

if TYPE_CHECKING:
    from oasis_attn.ops.depth_mix.routers import Mixer, Routers


def c_library() -> CDLL | None:
    """The compiled C kernels, or None: see `c_kernels.library`."""
    return c_kernels.library()


@cache
def triton_kernels() -> ModuleType | None:
    """The package `triton_kernels`; None if Triton is not installed."""
    try:
        from oasis_attn.ops.depth_mix import triton_kernels as package
    except ImportError:
        return None
    return package


def kernels_for(sources: Sequence[Tensor]) -> ModuleType | None:
    """`triton_kernels` if Triton is installed and its `fits` accepts the CUDA tensors `sources`.

    None otherwise.  Also None under torch.compile, which generates its own kernels, and while a
    CUDA graph is captured: the graph would store the address of the kernel's table of source
    addresses, and the table itself would be freed.
    """
    if not sources[0].is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    kernels = triton_kernels()
    if kernels is None or torch.cuda.is_current_stream_capturing() or not kernels.fits(sources):
        return None
    return kernels


def compiled_mixer(embedding_BTD: Tensor, routers: Routers, *, one_device: bool) -> Mixer | None:
    """A mixer with compiled kernels, for one forward pass without gradients; None without them.

    `one_device` says that all layers are on the device of the embedding.
    """
    if torch.compiler.is_compiling():  # it generates its own kernels
        return None
    from oasis_attn.ops.depth_mix.c_mixer import CMixer, can_use_c_mixer
    from oasis_attn.ops.depth_mix.triton_mixer import TritonMixer

    kernels = kernels_for([embedding_BTD])
    if kernels is not None:
        return TritonMixer(embedding_BTD, routers, kernels)
    if one_device and can_use_c_mixer(embedding_BTD):
        return CMixer(embedding_BTD, routers)
    return None
