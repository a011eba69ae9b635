"""The configuration of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oasis_attn.data import load_corpus
from oasis_attn.errors import (
    UserError,
    check_at_least,
    check_choice,
    check_flag,
    check_path,
    check_seed,
    check_type,
    check_whole,
    shown,
)
from oasis_attn.evaluation.samples import check_log

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig

TASKS = {
    "perplexity": "perplexity on windows of a corpus",
    "gsm8k": "Pass@k on GSM8K, with the prompts, shots and stop strings of lm-eval",
    "gsm8k-loglik": "log-likelihood of the solutions of GSM8K, without shots",
    "arith": "Pass@k on generated word problems of one to three steps, without shots",
    "majority": "accuracy of the answers of the majority task, and the loss there and elsewhere",
}

_MAX_TEMPERATURE = 1e4  # float32 can still distinguish logits that are divided by it


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The tasks, and the options of each.

    Attributes:
        tasks: names in `TASKS`.
        corpus: the corpus for perplexity: a name in `CORPORA`, or a text file or folder.  For
            `majority`, it is the corpus with the task, such as `majority-64`.
        split: split of that corpus for perplexity.  Other tasks always use the split `test`.
        window: tokens per window, for perplexity.
        stride: tokens from the start of a window to the start of the next; by default `window`,
            which means that windows are disjoint.  See `read_windows`.
        shots: worked examples in front of each problem of `gsm8k`, from its split `train`.
        k: the values of k for Pass@k.
        repeats: samples per problem, at least the largest k.
        temperature: 0 for greedy decoding, which allows one sample only; otherwise 1e-4 to 1e4.
        max_new_tokens: maximum number of tokens in an answer.
        seed: random seed of the samples.
        limit: maximum number of problems per task (the first ones), and of windows for perplexity
            and majority (spread over the text); by default, all.
        batch_size: windows or samples in one forward pass.
        cache: makes a cache for each batch, from the config of the model.  Likelihood is then
            computed through the cache, 32 tokens at a time.  Describe it in `model_notes`.  By
            default, likelihood uses no cache, and answers use that of transformers.
        samples: a folder for the logs, `<task>.jsonl`; by default, no log is written.
        resume: continue from the logs in `samples`.
        model_notes: more information about the model, for the record.  Logged samples are reused
            only if it is the same.

    Raises:
        UserError: at construction, for a value that is not allowed.
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
        if self.cache is not None and not callable(self.cache):
            raise UserError(
                f"cache: {shown(self.cache)} is not a function that makes a cache from a config"
            )
        if self.samples is not None:
            check_path("samples", self.samples)
        check_type("model_notes", self.model_notes, Mapping, "a mapping")
        if self.stride is not None and self.stride > self.window:
            raise UserError(f"stride: {self.stride} is more than the window of {self.window}")
        for k in self.k:
            check_whole("k", k, 1)
            if k > self.repeats:
                raise UserError(f"k: {k!r} is more than repeats={self.repeats}")
        check_at_least("temperature", self.temperature, 0, _MAX_TEMPERATURE)
        if 0 < self.temperature < 1 / _MAX_TEMPERATURE:
            raise UserError(
                f"temperature: {self.temperature!r} is below {1 / _MAX_TEMPERATURE:g}; use 0 for"
                " greedy decoding"
            )
        if self.repeats > 1 and not self.temperature:
            raise UserError(
                f"repeats: {self.repeats} greedy samples would be identical; give a temperature"
            )
        if self.resume and self.samples is None:
            raise UserError("resume: it needs samples, the folder with the logs")
        if "perplexity" in self.tasks:
            load_corpus(self.corpus, self.split)
        if "majority" in self.tasks and load_corpus(self.corpus).task is None:
            raise UserError(
                f"corpus: {shown(str(self.corpus))} has no majority task; give the corpus that the"
                " model was trained on, such as majority-64"
            )

    def log_path(self, task: str) -> Path | None:
        """The file for the samples of `task`; None if they are not logged."""
        return None if self.samples is None else Path(self.samples, f"{task}.jsonl")

    def check_logs(self) -> None:
        """Raise `UserError` if a log cannot be written, or exists and is not to be resumed."""
        for task in self.tasks:
            if (path := self.log_path(task)) is not None:
                check_log(path, resume=self.resume)
