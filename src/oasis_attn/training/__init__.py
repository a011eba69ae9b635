"""Training, from scratch or from an existing model, with the Trainer of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oasis_attn.training.config import TrainingConfig

if TYPE_CHECKING:
    from oasis_attn.training.run import train

__all__ = ["TrainingConfig", "train"]

if not TYPE_CHECKING:

    def __getattr__(name: str):
        """Import `train` on first use, so that a config can be checked without torch."""
        if name == "train":
            from oasis_attn.training.run import train

            return train
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
