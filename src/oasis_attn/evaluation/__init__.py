"""Evaluate a model: perplexity on text, and Pass@k on word problems.

`evaluate` is imported on first use, so that an `EvaluationConfig` can be checked without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from oasis_attn.evaluation.config import TASKS, EvaluationConfig
from oasis_attn.evaluation.scoring import score_answer
from oasis_attn.lazy import import_on_first_use

if TYPE_CHECKING:
    from oasis_attn.evaluation.run import evaluate

__all__ = ["TASKS", "EvaluationConfig", "evaluate", "score_answer"]

if not TYPE_CHECKING:  # type checkers would conclude that every name exists
    __getattr__ = import_on_first_use(__name__, {"evaluate": "oasis_attn.evaluation.run"})
