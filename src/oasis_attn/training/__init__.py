"""Training, from scratch or from a model that exists, on transformers' Trainer."""

from oasis_attn.training.config import TrainingConfig
from oasis_attn.training.run import train

__all__ = ["TrainingConfig", "train"]
