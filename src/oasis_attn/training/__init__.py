"""Training from scratch on transformers' Trainer."""

from oasis_attn.training.config import TrainingConfig
from oasis_attn.training.run import train

__all__ = ["TrainingConfig", "train"]
