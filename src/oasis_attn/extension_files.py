"""Run Python files of the user that register null signals, branch norms or token normalizers.

Only the user names these files, on the command line, in the environment or in Python.  A checkpoint
or a plan never does.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from oasis_attn.errors import UserError, message_of, reason, shown

EXTENSIONS_VARIABLE = "OASIS_EXTENSIONS"
"""Environment variable with paths of extension files, separated as those of PATH."""

_loaded: dict[str, str] = {}  # absolute path -> sha256


def load_extensions(paths: Iterable[str | Path]) -> None:
    """Run extension files, once for each process.

    Their names and hashes become part of the environment of records.

    Args:
        paths: Python files; relative paths start at the current folder.

    Raises:
        UserError: a file cannot be read or fails, with the line; another file of the same name was
            run.
    """
    for path in paths:
        resolved = os.path.realpath(path)
        if resolved not in _loaded:
            _loaded[resolved] = _run(resolved, str(path))


def loaded_extensions() -> tuple[str, ...]:
    """Absolute paths of the extension files that this process has run."""
    return tuple(_loaded)


def extension_hashes() -> dict[str, str]:
    """The extension files that this process has run: file name -> SHA-256 of the content."""
    return {os.path.basename(path): digest for path, digest in _loaded.items()}


def _run(path: str, given: str) -> str:
    """Run one file and return its SHA-256; `given` is its path for messages."""
    name = os.path.basename(path)
    if name in extension_hashes():
        raise UserError(f"extension: {shown(given)} has the name of a file that was run already")
    try:
        source = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"extension: {shown(given)} cannot be read ({reason(error)})") from error
    # Classes and functions are found by the name of their module, so that they can be pickled.
    module = ModuleType(f"oasis_attn_extension_{Path(name).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        said = error.msg if isinstance(error, SyntaxError) else message_of(error)
        what = said if isinstance(error, UserError) else f"{type(error).__name__}: {said}"
        where = f"extension: {shown(given)}, line {_line(path, error)}"
        raise UserError(" ".join(f"{where}: {what}".split())) from error
    return hashlib.sha256(source).hexdigest()


def _line(path: str, error: BaseException) -> int | None:
    """The line of the file `path` that raised `error`."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == path), 1)
