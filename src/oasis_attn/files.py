"""Atomic writes: a reader sees the old file, the new file or no file, never a partial file."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from oasis_attn.errors import UserError, check_path, shown

_REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EIO,
    errno.ENXIO, errno.ESTALE, errno.ENOLCK, errno.EOPNOTSUPP,
}  # fmt: skip


def cache_folder() -> Path:
    """The folder for files that can be regenerated: `$OASIS_CACHE`, or `~/.cache/oasis-attn`."""
    return Path(os.environ.get("OASIS_CACHE") or "~/.cache/oasis-attn").expanduser()


def refusal(error: BaseException) -> str | None:
    """Why the system could not write (disk full, no permission); None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        # safetensors and tokenizers (in Rust) have the number only in their message.
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else None
    if number in _REFUSALS:
        return os.strerror(number)
    # The message of PyTorch's writer has no reason.
    broken = isinstance(error, RuntimeError) and "inline_container.cc" in str(error)
    return "PyTorch could not write the whole file; the disk may be full" if broken else None


@contextmanager
def writing(path: str | Path, argument: str = "out") -> Iterator[None]:
    """Context in which a failure of the system to write raises `UserError` with path and reason."""
    try:
        yield
    except Exception as error:
        reason = None if isinstance(error, UserError) else refusal(error)
        if reason is None:
            raise
        file = getattr(error, "filename", None) or path
        where = "" if str(file) == str(path) else f" ({shown(str(file))})"
        raise UserError(
            f"{argument}: {shown(str(path))} cannot be written: {reason}{where}"
        ) from error


@contextmanager
def lock(path: str | Path, what: str, *, patience: float = 0.0) -> Iterator[None]:
    """Context that holds the lock file `path`; the system releases it if the process is killed.

    Args:
        path: created if it does not exist, and removed at the end.  A file that a killed process
            left behind is not locked.
        what: the locked object, for the error message.
        patience: seconds to wait for another process to release the lock.

    Raises:
        UserError: another process holds the lock, or the file cannot be written.
    """
    path = Path(path)
    end = time.monotonic() + patience
    while (file := _locked(path)) is None:
        if time.monotonic() > end:
            raise UserError(f"{what}: another process is using it")
        time.sleep(0.1)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked, so that no other process holds it
        os.close(file)


def is_locked(path: str | Path) -> bool:
    """Whether a process holds the lock file `path`."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(file)
    finally:
        os.close(file)


def _locked(path: Path) -> int | None:
    """Open and lock the file; None if another process holds the lock."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if _try_lock(file) and os.path.samestat(os.fstat(file), path.stat()):
                return file
        except FileNotFoundError:
            pass  # the process that held it removed it after it was opened here
        except BaseException:
            os.close(file)
            raise
    os.close(file)
    return None


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_text(path: str | Path, text: str, argument: str = "out") -> Path:
    """Write `text` in UTF-8 with `write_bytes`."""
    return write_bytes(path, text.encode(), argument)


def write_bytes(path: str | Path, data: bytes, argument: str = "out") -> Path:
    """Write `data` to a temporary file, flush it to disk, and rename it to `path`."""
    with replacing(path, argument) as file:
        file.write(data)
    return Path(path)


@contextmanager
def replacing(path: str | Path, argument: str = "out") -> Iterator[BinaryIO]:
    """Yield a temporary file, open for writing, that becomes `path` as in `staged_file`."""
    with staged_file(path, argument) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def staged_file(path: str | Path, argument: str = "out") -> Iterator[Path]:
    """Yield an empty temporary file that is flushed to disk and renamed to `path` at the end.

    If the block raises, nothing is left.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    with writing(path, argument):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            yield Path(temporary)
            os.fsync(descriptor)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        finally:
            os.close(descriptor)


@contextmanager
def staged_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` at the end.

    If the block raises, nothing is left.

    Raises:
        UserError: before the block, if `path` exists and is not an empty folder, or cannot be
            written.
    """
    path = Path(path)
    check_free(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            make_readable(temporary)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def make_readable(folder: Path) -> None:
    """Give `folder` the permissions of new files: temporary ones, and safetensors', are private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~mask)


def check_free(path: str | Path, argument: str = "out", *, hint: str = "") -> None:
    """Raise `UserError` if the folder `path` cannot be created; it may be an empty folder.

    Args:
        hint: what else can be done if it exists.
    """
    check_path(argument, path)
    path = Path(path)
    with writing(path, argument):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(
                f"{argument}: {str(path)!r} exists; give a new folder or remove it{hint}"
            )
        if path.resolve() == Path.cwd():
            raise UserError(
                f"{argument}: {str(path)!r} is the current folder; give a new folder in it"
            )
        _check_parent(path, argument)


def check_writable(path: str | Path, argument: str = "out") -> None:
    """Raise `UserError` if the file `path` cannot be written."""
    check_path(argument, path)
    path = Path(path)
    with writing(path, argument):
        if path.is_dir():
            raise UserError(f"{argument}: {str(path)!r} is a folder; give a file")
        if path.exists() and not path.is_file():
            raise UserError(f"{argument}: {str(path)!r} is not a regular file; give another path")
        _check_parent(path, argument)


def _check_parent(path: Path, argument: str) -> None:
    """Raise `UserError` if nothing can be created in the nearest existing parent of `path`."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"{argument}: {str(path)!r} cannot be written: {str(parent)!r} is a file")
    try:
        # Create a folder, because permission bits do not apply to file systems such as /proc.
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=f".{path.name}."))
    except OSError as error:
        raise UserError(
            f"{argument}: {shown(str(path))} cannot be written: {error.strerror} in {str(parent)!r}"
        ) from error
