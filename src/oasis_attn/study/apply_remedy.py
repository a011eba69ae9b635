"""The commands that apply the best try of the doctor to a model, and running them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from oasis_attn.devices import find_device
from oasis_attn.errors import UserError, shown
from oasis_attn.files import check_free
from oasis_attn.progress import Progress, no_progress
from oasis_attn.quantization.int8 import check_kernels
from oasis_attn.quantization.options import OASIS
from oasis_attn.quantization.prefix_checkpoint import prefix_checkpoint
from oasis_attn.quantization.quantize_checkpoint import quantize_checkpoint
from oasis_attn.quantization.remedies import option_text, shortest_name
from oasis_attn.quantization.schemes import Scheme
from oasis_attn.records import DoctorRecord, Record
from oasis_attn.report.remedies import ranked


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command: `oasis prefix` or `oasis quantize`.

    Attributes:
        command: `prefix` or `quantize`.
        model, out: the model that it reads and the folder that it writes.
        scheme: the scheme; None for the default of `prefix`.
        options: its other arguments, as in Python.
    """

    command: str
    model: str
    out: Path
    scheme: Scheme | None = None
    options: Mapping[str, Any]

    @property
    def line(self) -> str:
        """The command line."""
        words = ["oasis", self.command, self.model, "--out", str(self.out)]
        if self.scheme is not None:
            name, options = shortest_name(self.scheme)
            words += ["--scheme", name]
            for option, value in options.items():
                words += ["--scheme-option", f"{option}={option_text(value)}"]
        for option, value in self.options.items():
            flag = f"--{option.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)] if value is not False else []
        return shlex.join(words)

    def run(self, progress: Progress = no_progress) -> Record:
        """Run the command, and return its record."""
        run: Any = prefix_checkpoint if self.command == "prefix" else quantize_checkpoint
        given = {} if self.scheme is None else {"scheme": self.scheme}
        return run(self.model, self.out, **given, **self.options, progress=progress)


def steps(record: DoctorRecord, out: Path, arguments: Mapping[str, Any]) -> tuple[Step, ...]:
    """The commands that apply the best try.  The format is `oasis`, in which tries are measured.

    Args:
        record: the tries.
        out: a new folder for the quantized model.  If it has a prefix, there are two commands, and
            the model with the prefix, not yet quantized, is written beside it.
        arguments: the arguments of `doctor` that name texts and windows, `device` and
            `trust_remote_code`.
    """
    best = ranked(record)[0]
    scheme, model, found = Scheme.from_dict(best.scheme), record.model.name, []
    defaults = signature(quantize_checkpoint).parameters
    options = {k: value for k, value in arguments.items() if value != defaults[k].default}
    if best.prefix:
        folder = prefixed_folder(out)
        found.append(Step(command="prefix", model=model, out=folder, options=options))
        model = str(folder)
    simulate = {"simulate": not _has_kernels(scheme, find_device(arguments.get("device", "auto")))}
    seed = {"seed": record.seed} if record.seed else {}
    quantizing = options | {"format": OASIS} | simulate | seed
    found.append(Step(command="quantize", model=model, out=out, scheme=scheme, options=quantizing))
    return tuple(found)


def prefixed_folder(out: Path) -> Path:
    """The folder of the model with a prefix."""
    return out.with_name(f"{out.name}-prefixed")


def check_targets(out: Path, records: Path) -> None:
    """Raise `UserError` if a folder that `steps` may write exists, or is that of the `records`."""
    for folder in (out, prefixed_folder(out)):
        check_free(folder, "apply")
        if folder.resolve() == records.resolve():
            raise UserError(f"apply: {shown(str(folder))} is the folder of the records (--out)")


def _has_kernels(scheme: Scheme, device: torch.device) -> bool:
    try:
        check_kernels(scheme, device)
    except UserError:
        return False
    return True
