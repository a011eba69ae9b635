"""Files that can be made again, kept in the cache folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from oasis_attn.files import cache_folder, replacing


def cached_file(name: str, make: Callable[[BinaryIO], None]) -> Path:
    """The cached file `name`, made by `make` if absent.

    It is written beside its place and renamed when whole, so that processes that make it at the
    same time each find a whole one.
    """
    path = cache_folder() / name
    if path.is_file():
        return path
    with replacing(path, "cache") as file:
        make(file)
    return path
