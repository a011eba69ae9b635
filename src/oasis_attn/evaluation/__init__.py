"""How well a model predicts text and solves problems: `evaluate(model, tokenizer)`."""

from __future__ import annotations

from oasis_attn.evaluation.config import TASKS, EvaluationConfig
from oasis_attn.evaluation.evaluate import evaluate
from oasis_attn.evaluation.scoring import score_answer

__all__ = ["TASKS", "EvaluationConfig", "evaluate", "score_answer"]
