"""`native.c`, compiled when first needed into the cache folder, for this processor.

A decoded token's tensors are a few kilobytes, so that PyTorch spends its time on calling operations
and not in them; a prompt's mixes over depth are many small products that wait for memory.  What is
called twice a layer there is a function of C.
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
"""Floats of a vector there, and routers that are mixed for at once."""


class DepthState(ctypes.Structure):
    """`DepthState` of native.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("N", "D", "R", "block", "group", "null", "scale")),
        *((name, ctypes.c_float) for name in ("eps", "unit_eps")),
        *((name, ctypes.c_void_p) for name in ("queries_RD", "beta_R", "sources_SND")),
        *((name, ctypes.c_void_p) for name in ("inverse_rms_SN", "psi_SN", "psi_sum_N")),
        *((name, ctypes.c_void_p) for name in ("partial_GND", "top_GN", "mass_GN")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None.

    None where there is no C compiler (`CC`, or `cc`), where it fails, and where the environment
    variable `OASIS_NATIVE` is 0: PyTorch's operations then compute the same.
    """
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None or os.environ.get("OASIS_NATIVE") == "0":
        return None
    try:
        return _load(compiler)
    except (OSError, RuntimeError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        # No home folder, a command that cannot be parsed or run, a library without the functions.
        _logger.warning(
            "the compiled inference functions are not used, PyTorch's take their place: %s",
            " ".join(str(error).split()),
        )
        return None


def _load(compiler: str) -> ctypes.CDLL:
    source = files("oasis_attn.ops").joinpath("native.c").read_bytes()
    key = hashlib.sha256(repr((source, _FLAGS, compiler, processor())).encode()).hexdigest()
    built = cache_folder() / f"native-{key[:16]}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory() as folder:
            path, out = Path(folder, "native.c"), Path(folder, "native.so")
            path.write_bytes(source)
            command = [*shlex.split(compiler), *_FLAGS, str(path), "-o", str(out), "-lm"]
            subprocess.run(command, check=True, capture_output=True)
            write_bytes(built, out.read_bytes())
        _logger.info("the inference functions were compiled by %s: %s", compiler, built)
    loaded = ctypes.CDLL(str(built))
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    loaded.depth_step.argtypes = [*(pointer, integer, pointer, pointer, pointer, integer, integer)]
    loaded.null_step.argtypes = [pointer] * 4 + [number] + [integer] * 3
    for function in (loaded.depth_step, loaded.null_step):
        function.restype = None
    return loaded
