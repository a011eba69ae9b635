"""The device that a model runs on, as users name it: `auto`, `cpu`, `cuda` or `cuda:N`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from oasis_attn.errors import UserError, shown

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?")


def check_device(device: str) -> None:
    """Raise `UserError` unless `device` names a device that exists.

    `auto` and `cpu` do not import torch.
    """
    if not isinstance(device, str) or not _NAME.fullmatch(device):
        raise UserError(f"device: {shown(device)} is not one of auto, cpu, cuda, cuda:N")
    if not device.startswith("cuda"):
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UserError(
            f"device: {device!r} needs a GPU, and PyTorch finds none; allowed here: auto, cpu"
        )
    if int(device.partition(":")[2] or 0) >= count:
        names = ", ".join(f"cuda:{index}" for index in range(count))
        raise UserError(
            f"device: {device!r} does not exist; allowed here: auto, cpu, cuda, {names}"
        )


def find_device(device: str) -> torch.device:
    """The device of this name; `auto` is the current GPU, or the CPU if there is none."""
    check_device(device)
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has computed what it was asked for, as time measurements need it."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` says that the memory of a GPU is full."""
    # By name, so that a command that does not use torch does not import it.
    kinds = [kind.__name__ for kind in type(error).__mro__]
    full = "OutOfMemoryError" in kinds or "AcceleratorError" in kinds
    return full and "out of memory" in str(error)
