"""Writing files so that a reader sees the old one, the new one, or none: never half of one."""

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

from oasis_attn.errors import UserError, shown

_REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EIO,
    errno.ENXIO, errno.ESTALE, errno.ENOLCK, errno.EOPNOTSUPP,
}  # fmt: skip


def cache_folder() -> Path:
    """For files that can be made again: `$OASIS_CACHE`, default `~/.cache/oasis-attn`."""
    return Path(os.environ.get("OASIS_CACHE") or "~/.cache/oasis-attn").expanduser()


def refusal(error: BaseException) -> str | None:
    """Why the system refused to write (disk full, no permission); None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        # safetensors and tokenizers, written in Rust, give the number in their message only.
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else None
    if number in _REFUSALS:
        return os.strerror(number)
    # PyTorch's writer keeps no reason.
    broken = isinstance(error, RuntimeError) and "inline_container.cc" in str(error)
    return "PyTorch could not write the whole file; the disk may be full" if broken else None


@contextmanager
def writing(path: str | Path, argument: str = "out") -> Iterator[None]:
    """Raise `UserError` that names `path` and the reason where the system refuses to write."""
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
    """Hold the lock file `path`; the system frees it when the process ends, however it ends.

    Args:
        path: made if absent, and removed at the end; that of a killed process does not block.
        what: for the message: what the lock is on.
        patience: seconds to wait for another process to end.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    path = Path(path)
    end = time.monotonic() + patience
    while (file := _locked(path)) is None:
        if time.monotonic() > end:
            raise UserError(f"{what}: another process is at work on it")
        time.sleep(0.1)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is freed: nobody else can hold it yet
        os.close(file)


def is_locked(path: str | Path) -> bool:
    """Whether some process holds the lock file `path`."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(file)
    finally:
        os.close(file)


def _locked(path: Path) -> int | None:
    """The lock file, opened and held; None if another process holds it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if _try_lock(file) and os.path.samestat(os.fstat(file), path.stat()):
                return file
        except FileNotFoundError:
            pass  # its holder removed it after it was opened here
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


def write_text(path: str | Path, text: str) -> Path:
    """`write_bytes` of `text` in UTF-8."""
    return write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write `data` beside `path`, flush it to disk, then rename it into place."""
    with replacing(path) as file:
        file.write(data)
    return Path(path)


@contextmanager
def replacing(path: str | Path, argument: str = "out") -> Iterator[BinaryIO]:
    """Yield a new file beside `path` that, flushed to disk, becomes `path` when the block ends.

    A block that raises leaves nothing behind.

    Raises:
        UserError: the system refuses to write there.
    """
    path = Path(path)
    with writing(path, argument):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


@contextmanager
def staged_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` when the block ends well.

    A block that raises leaves nothing behind.  `path` must not exist, or be an empty folder:
    otherwise `UserError`, before any work is done.
    """
    path = Path(path)
    check_free(path)
    with writing(path):
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
    with writing(path, argument):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{argument}: {str(path)!r} exists; name a new folder or remove it")
        if path.resolve() == Path.cwd():
            raise UserError(
                f"{argument}: {str(path)!r} is the current folder; name a new one in it"
            )
        _check_above(path, argument)


def check_writable(path: str | Path, argument: str = "out") -> None:
    """Raise `UserError` if no file can be written at `path`."""
    path = Path(path)
    with writing(path, argument):
        if path.is_dir():
            raise UserError(f"{argument}: {str(path)!r} is a folder; name a file")
        if path.exists() and not path.is_file():
            raise UserError(f"{argument}: {str(path)!r} is no regular file; name another")
        _check_above(path, argument)


def _check_above(path: Path, argument: str) -> None:
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{argument}: {str(path)!r} cannot be written, {str(above)!r} is a file")
    try:
        # Permission bits say nothing about file systems such as /proc, so a name is tried.
        os.rmdir(tempfile.mkdtemp(dir=above, prefix=f".{path.name}."))
    except OSError as error:
        raise UserError(
            f"{argument}: {shown(str(path))} cannot be written: {error.strerror} in {str(above)!r}"
        ) from error
