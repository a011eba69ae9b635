"""Evaluate a model: perplexity on text, and Pass@k on word problems."""

from __future__ import annotations

from oasis_attn.evaluation.config import TASKS, EvaluationConfig
from oasis_attn.evaluation.evaluate import evaluate
from oasis_attn.evaluation.scoring import score_answer

__all__ = ["TASKS", "EvaluationConfig", "evaluate", "score_answer"]
