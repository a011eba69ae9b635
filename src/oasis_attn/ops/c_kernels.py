"""C kernels for inference on a CPU: `c_kernels.c`, compiled for this processor when first needed.

The tensors of a decoded token have a few kilobytes, so that PyTorch spends more time on calling
operations than in them; the mixes of a prompt are many small products that wait for memory.
Therefore the operations that run once or twice per layer are C functions: `depth_step` (see
`depth_mix/c_mixer.py`) and `null_step` (see `null_attention`).  The compiled library is stored in
the cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

from oasis_attn.files import cache_folder, write_bytes
from oasis_attn.records import processor

_logger = logging.getLogger(__name__)
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")

LANES, TILE = 16, 4
"""As in c_kernels.c: floats in a vector, and routers whose partial mixes are computed together."""


class DepthState(ctypes.Structure):
    """The struct `DepthState` of c_kernels.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("N", "D", "R", "block", "group", "null", "scale")),
        *((name, ctypes.c_float) for name in ("eps", "unit_eps")),
        *((name, ctypes.c_void_p) for name in ("queries_RD", "beta_R", "sources_SND")),
        *((name, ctypes.c_void_p) for name in ("inverse_rms_SN", "psi_SN", "psi_sum_N")),
        *((name, ctypes.c_void_p) for name in ("partial_GND", "top_GN", "total_GN")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled C kernels, or None.

    None if there is no C compiler (environment variable `CC`, or the command `cc`), if the compiler
    fails, or if the environment variable `OASIS_C_KERNELS` is 0.  PyTorch operations then compute
    the same results.
    """
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None or os.environ.get("OASIS_C_KERNELS") == "0":
        return None
    try:
        return _load(compiler)
    except (OSError, RuntimeError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        # No home folder, a command that cannot be parsed or run, a library without the kernels.
        _logger.warning(
            "the C kernels could not be compiled, so PyTorch operations replace them: %s",
            " ".join(str(error).split()),
        )
        return None


def _load(compiler: str) -> ctypes.CDLL:
    source = files("oasis_attn.ops").joinpath("c_kernels.c").read_bytes()
    key = hashlib.sha256(repr((source, _FLAGS, compiler, processor())).encode()).hexdigest()
    built = cache_folder() / f"c_kernels-{key[:16]}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory() as folder:
            path, out = Path(folder, "c_kernels.c"), Path(folder, "c_kernels.so")
            path.write_bytes(source)
            command = [*shlex.split(compiler), *_FLAGS, str(path), "-o", str(out), "-lm"]
            subprocess.run(command, check=True, capture_output=True)
            write_bytes(built, out.read_bytes())
        _logger.info("the C kernels were compiled by %s: %s", compiler, built)
    loaded = ctypes.CDLL(str(built))
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    loaded.depth_step.argtypes = [*(pointer, integer, pointer, pointer, pointer, integer, integer)]
    loaded.null_step.argtypes = [pointer] * 4 + [integer, number, integer, integer]
    for function in (loaded.depth_step, loaded.null_step):
        function.restype = None
    return loaded
