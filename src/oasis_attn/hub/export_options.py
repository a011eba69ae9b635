"""Checks of the options of an export, without torch, so that wrong ones fail at once."""

from __future__ import annotations

from pathlib import Path

from oasis_attn.errors import UserError, check_choice
from oasis_attn.files import check_free, check_writable

FORMATS = ("gguf", "transformers")
GGUF_TYPES = ("q8_0", "q4_0", "f16", "bf16", "f32")
"""Types of the weights in a GGUF file."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Types of the weights in a folder for transformers."""


def check_export(
    out: str | Path, format: str | None, weights: str | None, with_code: bool = False
) -> str:
    """Return the format, which by default follows from the name `out`.

    Raises:
        UserError: an unknown format or type of weights; `out` exists or cannot be written; the name
            of a GGUF file does not end in `.gguf`; it is to hold code.
    """
    path = Path(out)
    if format is None:
        format = "gguf" if path.suffix == ".gguf" else "transformers"
    check_choice("format", format, FORMATS)
    if weights is not None:
        check_choice("weights", weights, GGUF_TYPES if format == "gguf" else DTYPES)
    if format == "transformers":
        check_free(path)
        return format
    if with_code:
        raise UserError("with_code: a GGUF file holds no code; use --format transformers")
    if path.suffix != ".gguf":
        raise UserError(
            f"out: {str(path)!r} does not end in .gguf, as the name of a GGUF file does"
        )
    check_writable(path)
    if path.exists():
        raise UserError(f"out: {str(path)!r} exists; give a new file or remove it")
    return format
