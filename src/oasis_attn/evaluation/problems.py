"""Pass@k from samples: the metrics, their intervals, and a table by number of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from oasis_attn.data.problems import Problem
from oasis_attn.evaluation.scoring import Score, pass_at_k, score_answer, wilson_interval
from oasis_attn.records import Metric

Interval = tuple[float, float]


def pass_metrics(
    task: str, problems: Sequence[Problem], responses: Sequence[Sequence[str]], ks: Sequence[int]
) -> tuple[list[Metric], dict[str, Interval]]:
    """`<task>.pass@<k>.strict` and `.flexible`, means over problems, and their 95 % intervals."""
    metrics: list[Metric] = []
    intervals: dict[str, Interval] = {}
    scores = [
        [score_answer(text, problem.answer) for text in texts]
        for problem, texts in zip(problems, responses, strict=True)
    ]
    for k in ks:
        for way in Score._fields:
            name = f"{task}.pass@{k}.{way}"
            shares = [
                pass_at_k(len(row), sum(getattr(score, way) for score in row), k) for row in scores
            ]
            n = len(shares)
            error = stdev(shares) / math.sqrt(n) if n > 1 else None
            metrics.append(Metric(name=name, value=fmean(shares), n=n, standard_error=error))
            intervals[name] = wilson_interval(fmean(shares), n)
    return metrics, intervals


def by_steps(
    problems: Sequence[Problem], responses: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """The share of correct samples (strict), by number of steps (`<<...>>`) in the reference."""
    rows: dict[int, list[bool]] = {}
    for problem, texts in zip(problems, responses, strict=True):
        rows.setdefault(problem.answer.count("<<"), []).extend(
            score_answer(text, problem.answer).strict for text in texts
        )
    return [
        {"steps": steps, "samples": len(right), "strict": fmean(right)}
        for steps, right in sorted(rows.items())
    ]
