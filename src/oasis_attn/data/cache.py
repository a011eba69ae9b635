"""Files in the cache folder, which can be deleted because they can be regenerated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from oasis_attn.files import cache_folder, replacing


def cached_file(name: str, make: Callable[[BinaryIO], None]) -> Path:
    """The cached file `name`; if it is absent, `make` writes it.

    It is written under another name and renamed when complete, so that no process finds an
    incomplete file.
    """
    path = cache_folder() / name
    if path.is_file():
        return path
    with replacing(path, "cache") as file:
        make(file)
    return path
