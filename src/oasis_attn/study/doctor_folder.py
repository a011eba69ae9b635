"""The folder of `doctor`: its files, and whether its results are those of the same run.

It does not import torch, so that a command can refuse a folder at once.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from oasis_attn.data import Corpus
from oasis_attn.errors import UserError, shown
from oasis_attn.files import check_free
from oasis_attn.quantization.remedies import described
from oasis_attn.quantization.schemes import Scheme
from oasis_attn.records import DoctorRecord, TextInfo
from oasis_attn.report.remedies import has_tries

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DIAGNOSIS, RECORD = "diagnosis.json", "record.json"
_SAME = {
    "sha256": "model",
    "scheme": "scheme",
    "seed": "seed",
    "data": "evaluation text",
    "calibration": "calibration text",
}
"""The fields of a record that a second run must have in common, and their names for the user."""
_OF_CONFIG = ("family", "architecture", "parameters")
"""What the configuration of a model says about it, of the fields of `ModelInfo`."""


def stored_results(
    out: Path,
    *,
    scheme: Scheme,
    seed: int,
    corpora: tuple[Corpus, Corpus],
    window: int,
    windows: int,
) -> DoctorRecord | None:
    """The record in `out`; None if `out` can be created.

    Args:
        scheme: of the run, with one scale per output channel.
        corpora: for calibration, and for evaluation.

    Raises:
        UserError: `out` has other files, its record lacks numbers, or these arguments show that it
            is the record of another run.
    """
    path = out / RECORD
    if not path.is_file():
        check_free(out)
        return None
    stored = DoctorRecord.load(path)
    if stored.tries and not has_tries(stored):
        raise UserError(f"out: {str(path)!r} lacks numbers of its tries; give a new folder")
    for name, value in {"scheme": scheme.to_dict(), "seed": seed}.items():
        if getattr(stored, name) != value:
            raise _other(out, stored, name)
    for name, corpus in zip(("calibration", "data"), corpora, strict=True):
        info: TextInfo = getattr(stored, name)
        read = (info.corpus, info.split, info.window)
        if read != (corpus.name, corpus.split, window) or info.windows > windows:
            raise _other(out, stored, name)
    return stored


def check_config(
    config: PreTrainedConfig, *, out: Path, stored: DoctorRecord, trust_remote_code: bool
) -> None:
    """Raise `UserError` if `config` is not that of the model in the record `stored`.

    It builds the model without memory for its weights, and stops when it is too large.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from oasis_attn.hub.checkpoint import parameter_limit
    from oasis_attn.hub.model_info import describe_model

    other, known = _other(out, stored, "sha256"), stored.model
    try:
        # The limit counts the matrix of a tied head, too.
        with torch.device("meta"), parameter_limit(2 * known.parameters, str(other)):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code
            )
    except UserError:
        raise
    except Exception:  # of a broken file, the library may raise any type; loading it says why
        return
    if any(getattr(describe_model(model), name) != getattr(known, name) for name in _OF_CONFIG):
        raise other


def resumed(out: Path, record: DoctorRecord) -> DoctorRecord:
    """The record in `out` with model and tolerance of `record`; `record` if there is none.

    The model is the same, but its folder may have another name now.

    Raises:
        UserError: the record in `out` is of another run.
    """
    if not (out / RECORD).is_file():
        return record
    stored = DoctorRecord.load(out / RECORD)
    for name in _SAME:
        if getattr(stored, name) != getattr(record, name):
            raise _other(out, stored, name)
    return replace(stored, model=record.model, tolerance=record.tolerance)


def _other(out: Path, stored: DoctorRecord, name: str) -> UserError:
    return UserError(
        f"out: {str(out)!r} has results for another {_SAME[name]}, {_described(stored, name)}; give"
        " a new folder"
    )


def _described(stored: DoctorRecord, name: str) -> str:
    """The value of a field of `stored` in few words."""
    value = getattr(stored, name)
    if isinstance(value, TextInfo):
        return f"{value.windows} windows of {value.window} tokens of {value.corpus} {value.split}"
    if name == "sha256":
        return shown(stored.model.name)
    return f"'{described(Scheme.from_dict(value))}'" if name == "scheme" else str(value)
