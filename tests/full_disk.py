"""A disk that is full, as far as this process can tell."""

from __future__ import annotations

import contextlib
import resource
import signal


@contextlib.contextmanager
def files_of_at_most(size: int):
    """As on a full disk: what is written beyond `size` bytes of a file is refused."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
