"""Writing files so that a reader sees the old one, the new one, or none: never half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oasis_attn.errors import UserError


def cache_folder() -> Path:
    """For files that can be made again: `$OASIS_CACHE`, default `~/.cache/oasis-attn`."""
    return Path(os.environ.get("OASIS_CACHE") or "~/.cache/oasis-attn").expanduser()


def write_text(path: str | Path, text: str) -> Path:
    """`write_bytes` of `text` in UTF-8."""
    return write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write `data` beside `path`, flush it to disk, then rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


@contextmanager
def staged_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` when the block ends well.

    A block that raises leaves nothing behind.  `path` must not exist, or be an empty folder:
    otherwise `UserError`, before any work is done.
    """
    path = Path(path)
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_free(path: str | Path, argument: str = "out") -> None:
    """Raise `UserError` if no new folder can be put at `path`; an empty one is as good as none."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{argument}: {str(path)!r} exists; name a new folder or remove it")
    if path.resolve() == Path.cwd():
        raise UserError(f"{argument}: {str(path)!r} is the current folder; name a new one in it")
    _check_above(path, argument)


def check_writable(path: str | Path, argument: str = "out") -> None:
    """Raise `UserError` if no file can be written at `path`."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{argument}: {str(path)!r} is a folder; name a file")
    _check_above(path, argument)


def _check_above(path: Path, argument: str) -> None:
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{argument}: {str(path)!r} cannot be written, {str(above)!r} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{argument}: {str(path)!r} cannot be written, {str(above)!r} is protected")
