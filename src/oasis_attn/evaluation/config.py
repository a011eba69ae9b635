"""What an evaluation is asked to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import Cache, PreTrainedConfig

from oasis_attn.data import load_corpus
from oasis_attn.errors import (
    UserError,
    check_at_least,
    check_choice,
    check_flag,
    check_seed,
    check_whole,
    shown,
)

TASKS = {
    "perplexity": "perplexity on windows of a corpus",
    "gsm8k": "GSM8K Pass@k, prompts, shots and stops as lm-eval has them",
    "gsm8k-loglik": "log-likelihood of GSM8K's solutions, without shots",
    "arith": "Pass@k on made word problems of one to three steps, without shots",
}

_HOTTEST = 1e4  # a temperature; float32 keeps logits apart that are divided by it, or multiplied


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Tasks, and how each is run.

    Attributes:
        tasks: names in `TASKS`.
        corpus: that perplexity is measured on: a name in `CORPORA`, or a text file or folder.
        split: of the corpus.  Problems are always those of their split `test`.
        window: tokens per window.
        stride: tokens between windows; default, the window: no overlap.  See `strided_windows`.
        shots: worked examples in front of each problem of `gsm8k`, out of its split `train`.
        k: the ks of Pass@k.
        repeats: samples per problem, at least the largest k.
        temperature: 0 is greedy, which allows one sample only; any other from 1e-4 to 1e4.
        max_new_tokens: an answer is cut off after so many.
        seed: of the samples.
        limit: problems or windows per task, from the first; default, all.
        batch_size: windows or samples in one forward pass.
        cache: makes, from the model's config, a cache for each batch; likelihood is then computed
            through it, 32 tokens at a time.  Name it in `model_notes`.  Default: none for
            likelihood, transformers' own for answers.
        samples: a folder for the logs, `<task>.jsonl`; default, none is written.
        resume: go on from the logs in `samples`.
        model_notes: more about the model, for the record; logged samples are reused only if it is
            the same.

    Raises:
        UserError: at construction, for any value outside what is said above.
    """

    tasks: Sequence[str] = ("perplexity",)
    corpus: str | Path = "wikitext-2"
    split: str = "test"
    window: int = 512
    stride: int | None = None
    shots: int = 5
    k: Sequence[int] = (1,)
    repeats: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0
    limit: int | None = None
    batch_size: int = 8
    cache: Callable[[PreTrainedConfig], Cache] | None = None
    samples: str | Path | None = None
    resume: bool = False
    model_notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tasks", "k"):
            value = getattr(self, name)
            listed = isinstance(value, Sequence) and not isinstance(value, str)
            if not listed or not value or any(each in value[:at] for at, each in enumerate(value)):
                raise UserError(
                    f"{name}: {shown(value)} is not a list of at least one, all different"
                )
        for task in self.tasks:
            check_choice("tasks", task, TASKS)
        lowest = {
            "window": 2,
            "stride": 1,
            "shots": 0,
            "repeats": 1,
            "max_new_tokens": 1,
            "limit": 1,
            "batch_size": 1,
        }
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None or name not in ("stride", "limit"):
                check_whole(name, value, least)
        check_seed("seed", self.seed)
        check_flag("resume", self.resume)
        if self.stride is not None and self.stride > self.window:
            raise UserError(f"stride: {self.stride} is more than the window of {self.window}")
        for k in self.k:
            check_whole("k", k, 1)
            if k > self.repeats:
                raise UserError(f"k: {k!r} is more than repeats={self.repeats}")
        check_at_least("temperature", self.temperature, 0, _HOTTEST)
        if 0 < self.temperature < 1 / _HOTTEST:
            raise UserError(
                f"temperature: {self.temperature!r} is below {1 / _HOTTEST:g}; 0 is greedy"
            )
        if self.repeats > 1 and not self.temperature:
            raise UserError(
                f"repeats: {self.repeats} greedy samples would be the same one; give a temperature"
            )
        if self.resume and self.samples is None:
            raise UserError("resume: it needs samples, the folder to resume from")
        if "perplexity" in self.tasks:
            load_corpus(self.corpus, self.split)
