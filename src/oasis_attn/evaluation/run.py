"""Runs the tasks of an evaluation one after the other, and makes their record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.data import load_corpus, tokenizer_sha256
from oasis_attn.data.problems import Problem, read_problems
from oasis_attn.data.windows import read_windows
from oasis_attn.errors import (
    UserError,
    check_choice,
    check_flag,
    check_loaded,
    check_tokenizer,
)
from oasis_attn.evaluation.config import EvaluationConfig
from oasis_attn.evaluation.generate import ANSWER_FIELDS, check_prompts, generate
from oasis_attn.evaluation.harness import HarnessGsm8k, check_harness
from oasis_attn.evaluation.likelihood import LOSS_FIELDS, score_continuations, score_windows
from oasis_attn.evaluation.majority import ANSWER_COUNTS, question_id, score_answers
from oasis_attn.evaluation.problems import Interval, by_steps, pass_metrics
from oasis_attn.evaluation.samples import Sample, SampleLog
from oasis_attn.evaluation.scoring import Z95, ratio_of_sums, score_answer, wilson_interval
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.model_info import check_lengths, describe_model, fingerprint
from oasis_attn.hub.tokenizer_prefix import prefix_in_tokenizer
from oasis_attn.records import EvaluationRecord, Metric, current_environment


@dataclass
class _Run:
    """A model with the configuration of its evaluation, and the results so far."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: EvaluationConfig
    identity: dict[str, Any]
    metrics: list[Metric] = field(default_factory=list)
    intervals: dict[str, Interval] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def log(self, task: str, protocol: dict[str, Any], fields: Mapping[str, type]) -> SampleLog:
        path = self.config.log_path(task)
        whole = {"task": task} | self.identity | protocol
        return SampleLog(path, whole, fields=fields, resume=self.config.resume)


def evaluate(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    **options: Any,
) -> EvaluationRecord:
    """Perplexity on text, and the answers to word problems and to the majority task.

    Args:
        model: a causal decoder in memory (of transformers or this library, or quantized); it is run
            in eval mode, and is unchanged afterwards.  Or a name for `load_model`, which also loads
            the tokenizer.
        tokenizer: the tokenizer of a model in memory.  It needs no padding token, and its padding
            side does not matter.
        device: see `load_model`; a model in memory stays where it is.
        trust_remote_code: see `load_model`.
        options: the fields of `EvaluationConfig`: `tasks`, `corpus`, `limit`, `samples`, ...

    Returns:
        Metrics by task:
        perplexity: `perplexity.windowed`, the exponential of `loss.windowed` (nats per token), or
            `.strided` with a stride below the window;
        gsm8k, arith: `<task>.pass@<k>.strict` and `.flexible` (see `score_answer`), and
            `gsm8k.lm_eval.<filter>`, the score of lm-eval for the first sample of each problem;
        majority: `majority.accuracy` of the answers, given all earlier tokens of the text,
            `majority.answer_loss` and `majority.other_loss` (nats per token);
        gsm8k-loglik: `gsm8k.answer_loglik`, the mean over problems of the solution's mean
            log-probability per token, in nats.
        A prefix in the tokenizer precedes every window and prompt.
        `intervals` has the 95 % interval of each: Wilson's for shares, and a normal one otherwise.

    Raises:
        UserError: before the first task runs, for an unknown or bad option, a log that exists
            already or cannot be written, missing data or a missing lm-eval, or a window or prompt
            that is too long for the model.
    """
    allowed = (*(each.name for each in fields(EvaluationConfig)), "device", "trust_remote_code")
    for name in options:
        check_choice("options", name, allowed)
    check_flag("trust_remote_code", trust_remote_code)
    config = EvaluationConfig(**options)
    if "gsm8k" in config.tasks:
        check_harness()
    config.check_logs()
    if isinstance(model, str | Path):
        if tokenizer is not None:
            raise UserError("tokenizer: allowed with a model in memory only; a name loads its own")
        model, tokenizer = load_model(model, device=device, trust_remote_code=trust_remote_code)
    elif not isinstance(device, str) or device != "auto":
        raise UserError(f"device: {device!r} is for a name; a model in memory stays where it is")
    if tokenizer is None:
        raise UserError("tokenizer: None; a model in memory needs its tokenizer given")
    check_loaded(model)
    check_tokenizer(tokenizer)
    run = _Run(
        model=model,
        tokenizer=tokenizer,
        config=config,
        identity={
            "model": fingerprint(model),
            "tokenizer": tokenizer_sha256(tokenizer),
            "model_notes": dict(config.model_notes),
        },
    )
    # All tasks are prepared, which finds errors, before the first one runs.
    for measure in [_TASKS[task](run) for task in config.tasks]:
        measure()
    return EvaluationRecord(
        environment=current_environment(model.device),
        model=describe_model(model),
        sha256=run.identity["model"],
        model_notes=dict(config.model_notes),
        data=run.data,
        intervals=run.intervals,
        seed=config.seed if config.temperature else None,
        metrics=tuple(run.metrics),
        tables=run.tables,
    )


Measure = Callable[[], object]
"""Runs a prepared task, and adds the results to its `_Run`."""


def _perplexity(run: _Run) -> Measure:
    config, first = run.config, prefix_in_tokenizer(run.tokenizer)
    check_lengths(run.model, [len(first) + config.window], "window")
    embedding: Any = run.model.get_input_embeddings()
    windows = read_windows(
        load_corpus(config.corpus, config.split),
        run.tokenizer,
        window=config.window,
        windows=config.limit,
        stride=config.stride,
        vocab_size=embedding.weight.shape[0],
    )
    info = asdict(windows.info) | ({"prefix": first} if first else {})
    # Without the number of windows, so that a log can be resumed with another number.
    protocol = {name: info[name] for name in ("sha256", "window", "stride", "separator", "bos")}

    def measure() -> None:
        log = run.log("perplexity", protocol, LOSS_FIELDS)
        samples = score_windows(
            *(run.model, windows),
            log=log,
            batch_size=config.batch_size,
            cache=config.cache,
            first=first,
        )
        loss, error = ratio_of_sums([(row["loss"], row["tokens"]) for row in samples])
        kind = "windowed" if windows.info.stride == config.window else "strided"
        n = len(samples)
        run.metrics += [
            Metric(name=f"perplexity.{kind}", value=_exp(loss), n=n),
            Metric(name=f"loss.{kind}", value=loss, n=n, standard_error=error),
        ]
        if error is not None:
            low, high = loss - Z95 * error, loss + Z95 * error
            run.intervals[f"loss.{kind}"] = low, high
            run.intervals[f"perplexity.{kind}"] = _exp(low), _exp(high)
        run.data["perplexity"] = info

    return measure


def _exp(x: float) -> float:
    """math.exp, or infinity for a loss so large that math.exp raises an error."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _majority(run: _Run) -> Measure:
    config, first = run.config, prefix_in_tokenizer(run.tokenizer)
    corpus = load_corpus(str(config.corpus).partition("+")[0], "test")  # without a text after it
    assert corpus.task is not None  # `EvaluationConfig` has checked it
    check_lengths(run.model, [len(first) + corpus.task.window], "window")
    question = question_id(run.tokenizer)
    windows = read_windows(corpus, run.tokenizer, window=corpus.task.window, windows=config.limit)
    info = asdict(windows.info) | ({"prefix": first} if first else {})
    protocol = {name: info[name] for name in ("sha256", "window", "separator", "bos")}

    def measure() -> None:
        samples = score_answers(
            run.model,
            windows,
            question,
            log=run.log("majority", protocol, ANSWER_COUNTS),
            batch_size=config.batch_size,
            cache=config.cache,
            first=first,
        )
        n = len(samples)
        for name, part, whole in (
            ("accuracy", "right", "answers"),
            ("answer_loss", "answer_loss", "answers"),
            ("other_loss", "other_loss", "others"),
        ):
            value, error = ratio_of_sums([(row[part], row[whole]) for row in samples])
            metric = Metric(name=f"majority.{name}", value=value, n=n, standard_error=error)
            run.metrics.append(metric)
            if name == "accuracy":
                run.intervals[metric.name] = wilson_interval(value, n)
            elif error is not None:
                run.intervals[metric.name] = value - Z95 * error, value + Z95 * error
        run.data["majority"] = info

    return measure


def _gsm8k(run: _Run) -> Measure:
    problems, data = _problems(run, "gsm8k")
    shots = run.config.shots
    examples = list(read_problems(load_corpus("gsm8k", "train"))) if shots else []
    harness = HarnessGsm8k(problems, examples, shots=shots)
    data |= {"shots": shots, "lm_eval_task": f"gsm8k {harness.version}"}
    answers = _answers(run, "gsm8k", problems, harness.prompts, harness.stops, data)

    def measure() -> None:
        first = harness.scores([texts[0] for texts in answers()])
        run.metrics += [
            Metric(name=f"gsm8k.lm_eval.{name}", value=value, n=len(problems))
            for name, value in first.items()
        ]

    return measure


def _arith(run: _Run) -> Measure:
    problems, data = _problems(run, "arith")
    prompts = [_prompt(problem) for problem in problems]
    return _answers(run, "arith", problems, prompts, ["Question:"], data)


def _answers(
    run: _Run,
    task: str,
    problems: Sequence[Problem],
    prompts: Sequence[str],
    stops: Sequence[str],
    data: dict[str, Any],
) -> Callable[[], list[list[str]]]:
    """A function that generates answers to the problems, scores them and returns them."""
    config = run.config
    check_prompts(run.model, run.tokenizer, prompts, config.max_new_tokens)
    how: dict[str, Any] = {
        "stops": list(stops),
        "temperature": config.temperature,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed if config.temperature else None,
    }

    def finish(index: int, text: str) -> Sample:
        reference = problems[index].answer
        return {"reference": reference} | score_answer(text, reference)._asdict()

    def answer() -> list[list[str]]:
        responses = generate(
            run.model,
            run.tokenizer,
            prompts,
            log=run.log(task, data | how, ANSWER_FIELDS),
            finish=finish,
            stops=stops,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            repeats=config.repeats,
            temperature=config.temperature,
            seed=config.seed,
            cache=config.cache,
        )
        metrics, intervals = pass_metrics(task, problems, responses, config.k)
        run.metrics += metrics
        run.intervals |= intervals
        run.tables[f"{task}.steps"] = by_steps(problems, responses)
        run.data[task] = data | how | {"problems": len(problems), "repeats": config.repeats}
        return responses

    return answer


def _gsm8k_loglik(run: _Run) -> Measure:
    task, name = "gsm8k-loglik", "gsm8k.answer_loglik"
    problems, data = _problems(run, "gsm8k")

    def measure() -> None:
        samples = score_continuations(
            run.model,
            run.tokenizer,
            [(_prompt(problem), " " + problem.answer) for problem in problems],
            log=run.log(task, data, LOSS_FIELDS),
            batch_size=run.config.batch_size,
            cache=run.config.cache,
        )
        values = [-row["loss"] / row["tokens"] for row in samples]
        n, mean = len(values), fmean(values)
        error = stdev(values) / math.sqrt(n) if n > 1 else None
        run.metrics.append(Metric(name=name, value=mean, n=n, standard_error=error))
        if error is not None:
            run.intervals[name] = mean - Z95 * error, mean + Z95 * error
        run.data[task] = data | {"problems": n}

    return measure


def _problems(run: _Run, name: str) -> tuple[list[Problem], dict[str, Any]]:
    """The first problems of the test split of a corpus, and its description for the record."""
    corpus = load_corpus(name, "test")
    problems = list(islice(read_problems(corpus), run.config.limit))
    return problems, {"corpus": name, "split": "test", "corpus_sha256": corpus.sha256}


def _prompt(problem: Problem) -> str:
    return f"Question: {problem.question}\nAnswer:"


_TASKS: dict[str, Callable[[_Run], Measure]] = {
    "perplexity": _perplexity,
    "gsm8k": _gsm8k,
    "gsm8k-loglik": _gsm8k_loglik,
    "arith": _arith,
    "majority": _majority,
}
