"""Where a result was computed: package versions, hardware, threads and git commit."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from oasis_attn.extension_files import extension_hashes
from oasis_attn.records.schema import OPTIONAL

if TYPE_CHECKING:
    import torch

_PACKAGES = ("oasis-attn", "torch", "transformers", "accelerate", "tokenizers", "datasets", "numpy")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The software and hardware that a result was computed with.

    Attributes:
        versions: version of Python and of each installed package that results depend on.
        device: what the model ran on: name of the GPU, or of the processor with its widest vector
            instructions.
        cores: logical processors of the machine.
        threads: threads that PyTorch uses within one operation.
        platform: the operating system.
        commit: git commit of the package's source, with `+` if files were changed since; None
            if the package does not run from a git checkout.
        extensions: the user's extension files that were run: name -> SHA-256; absent from the file
            if there were none.
    """

    versions: dict[str, str]
    device: str
    cores: int | None
    threads: int
    platform: str
    commit: str | None
    extensions: dict[str, str] = field(default_factory=dict, metadata=OPTIONAL)


def current_environment(device: torch.device | None = None) -> Environment:
    """The environment of this process, with the device that a model ran on.

    Args:
        device: that of the model; None is the CPU.
    """
    here = _environment()
    if device is not None and device.type == "cuda":
        import torch

        here = replace(here, device=torch.cuda.get_device_name(device))
    return replace(here, extensions=extension_hashes())


@cache
def _environment() -> Environment:
    import torch

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return Environment(
        versions=versions,
        device=processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        platform=platform.system(),
        commit=_commit(),
    )


@cache
def processor() -> str:
    """The processor's name and the widest vector instructions that PyTorch uses on it.

    Several processor generations can share a name, and the vector width decides the order in which
    sums are taken, and so their last bits.
    """
    import torch

    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = next(names, name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str | None:
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        if not git("ls-files", "--", "__init__.py"):
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
