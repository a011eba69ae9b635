"""Training, from scratch or from an existing model, with the Trainer of transformers.

`train` is imported on first use, so that a `TrainingConfig` can be checked without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from oasis_attn.lazy import import_on_first_use
from oasis_attn.training.config import TrainingConfig

if TYPE_CHECKING:
    from oasis_attn.training.run import train

__all__ = ["TrainingConfig", "train"]

if not TYPE_CHECKING:  # type checkers would conclude that every name exists
    __getattr__ = import_on_first_use(__name__, {"train": "oasis_attn.training.run"})
