"""Run one trial of a study: train, measure, evaluate, quantize; write one record at the end."""

from __future__ import annotations

import io
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.data import HeldOut, held_out_windows, load_corpus
from oasis_attn.errors import UserError
from oasis_attn.evaluation import evaluate
from oasis_attn.files import lock, write_bytes
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.model_info import describe_model
from oasis_attn.measure import diagnose
from oasis_attn.measure.loss import measure_loss
from oasis_attn.quantization import quantize, quantized_modules, schemes
from oasis_attn.records import Metric, TrainingRecord, TrialRecord, current_environment
from oasis_attn.study.decoder_trial import run_decoder_trial
from oasis_attn.study.plan import Trial
from oasis_attn.study.study_metrics import TIMES
from oasis_attn.training import train

TOLERANCE = 1e-6
"""Relative tolerance for a rerun with the same processor, versions and number of threads."""
LOCK_TIMEOUT = 5.0
"""Seconds to wait for a lock: a worker needs a moment to exit after its parent was killed."""
_CHECKPOINTS = 4  # per training run


@dataclass(kw_only=True)
class TrialState:
    """The trained model of a trial, its held-out text, and the results so far."""

    trial: Trial
    trained: TrainingRecord
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: HeldOut
    metrics: list[Metric] = field(default_factory=list)
    tables: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)


def measure(state: TrialState) -> None:
    """Measure the unquantized model: outlier.*, sink.*, depth.* and joint.*."""
    record = diagnose(
        state.model,
        state.text.measured,
        joint=True,
        causal=state.model.config.residual == "depth",  # measures the loss without each source
    )
    state.metrics += record.metrics
    state.tables |= record.tables


def evaluate_tasks(state: TrialState) -> None:
    """Evaluate the unquantized model on the tasks."""
    state.metrics += _tasks(state.trial, state.model, state.tokenizer)


def quantize_and_measure(state: TrialState) -> None:
    """Measure perplexity and tasks with each quantization scheme, as `NAME@SCHEME`."""
    for scheme in state.trial.schemes:
        needed = schemes()[scheme].needs_calibration
        batches = state.text.calibration.ids_NT.split(1) if needed else None
        quantized_model = quantize(state.model, scheme, calibration=batches)
        kept = [*measure_loss(quantized_model, state.text.measured)]
        kept += _tasks(state.trial, quantized_model, state.tokenizer)
        state.metrics += [replace(metric, name=f"{metric.name}@{scheme}") for metric in kept]
        state.targets[scheme] = len(quantized_modules(quantized_model))


STEPS: tuple[Callable[[TrialState], None], ...] = (measure, evaluate_tasks, quantize_and_measure)


def run_trial(trial: Trial, path: Path, work: Path, *, command: str) -> TrialRecord:
    """Run `trial` unless its record exists, and return the record.

    If the process is killed, it leaves no record; the next call resumes from the last checkpoint
    (a decoder on a generated task has none and starts again) and gets the same results.

    Args:
        trial: the trial.
        path: path of the record, which is written atomically at the end.
        work: folder for temporary files; removed at the end.
        command: the command that runs this trial again, for the record.

    Raises:
        UserError: another process runs this trial, or a step fails on the given values.
    """
    with lock(work.with_name(f"{work.name}.lock"), f"trial {trial.id!r}", patience=LOCK_TIMEOUT):
        if path.is_file():
            return TrialRecord.load(path)
        started, processor = time.monotonic(), time.process_time()
        torch.set_num_threads(trial.threads)
        work.mkdir(parents=True, exist_ok=True)
        if trial.on_task:
            record = run_decoder_trial(trial, command)
        else:
            record = _run_language_trial(trial, work, command)
        times = (time.monotonic() - started, time.process_time() - processor)
        timed = tuple(Metric(name=n, value=t) for n, t in zip(TIMES, times, strict=True))
        record = replace(record, metrics=(*record.metrics, *timed))
        record.save(path)
        shutil.rmtree(work)
    return record


def _run_language_trial(trial: Trial, work: Path, command: str) -> TrialRecord:
    state = _train(trial, work)
    for step in STEPS:
        step(state)
    return _record(state, command)


def _train(trial: Trial, work: Path) -> TrialState:
    config = trial.training_config(work, resume=True)
    if "save_every" not in trial.training:
        rows = max(1, config.steps // (_CHECKPOINTS * config.log_every))
        config = replace(config, save_every=rows * config.log_every)
    random_state = work / "random.pt"
    if (work / "record.json").is_file() and not random_state.is_file():
        shutil.rmtree(work)  # the process was killed between writing the two files
    work.mkdir(parents=True, exist_ok=True)
    try:
        trained = train(config, progress=False)
    except UserError as error:
        if not str(error).startswith("resume:"):
            raise
        # A killed process left files that training cannot resume from.
        shutil.rmtree(work)
        work.mkdir()
        trained = train(config, progress=False)
    model, tokenizer = load_model(work)
    _restore_random_state(random_state)
    if torch.cuda.is_available():
        nn.Module.to(model, "cuda")
    text = held_out_windows(
        load_corpus(trial.corpus, config.eval_split),
        tokenizer,
        window=config.block_length,
        windows=trial.windows,
    )
    return TrialState(trial=trial, trained=trained, model=model, tokenizer=tokenizer, text=text)


def _restore_random_state(path: Path) -> None:
    """Set the random state that followed training, or save it to `path` if it is not there.

    The shuffled null signal draws random numbers during measurement; a resumed trial must draw
    the same ones.
    """
    if path.is_file():
        processor, *devices = torch.load(path)
        torch.set_rng_state(processor)
        torch.cuda.set_rng_state_all(devices)
    else:
        stream = io.BytesIO()
        torch.save([torch.get_rng_state(), *torch.cuda.get_rng_state_all()], stream)
        write_bytes(path, stream.getvalue())


def _tasks(
    trial: Trial, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Metric]:
    if not trial.tasks:
        return []
    options = {"tasks": trial.tasks, "corpus": trial.corpus} | dict(trial.evaluation)
    record = evaluate(model, tokenizer, **options)
    return [metric for metric in record.metrics if not metric.where]


def _record(state: TrialState, command: str) -> TrialRecord:
    trial, trained = state.trial, state.trained
    return TrialRecord(
        environment=current_environment(state.model.device),
        model=replace(describe_model(state.model), name=trial.id, variant=trial.variant),
        trial=trial.to_dict(),
        command=command,
        trained_parameters=trained.trained_parameters,
        targets=state.targets,
        tokenizer_sha256=trained.data.tokenizer_sha256,
        train=trained.data.train,
        train_corpus_sha256=trained.data.corpus_sha256,
        data=state.text.measured.info,
        calibration_windows=len(state.text.calibration),
        seed=trial.seed,
        metrics=(trained.metric("training.loss"), *state.metrics),
        tables={"loss": trained.tables["loss"]} | state.tables,
    )


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """A rerun compared with the committed record of the same trial.

    Attributes:
        compared: number of metrics of the committed record, without run times.
        tolerance: the largest relative difference that counts as equal.
        differences: metric -> (committed value, value of the rerun; None if it has none), where
            they differ by more.
        environments: field -> (committed value, value of the rerun), where the environments
            differ, such as commit or hardware: the likely reason if a metric differs.
    """

    compared: int
    tolerance: float
    differences: dict[str, tuple[float | None, float | None]]
    environments: dict[str, tuple[object, object]]

    @property
    def reproduced(self) -> bool:
        """Whether no metric differs."""
        return not self.differences

    @property
    def text(self) -> str:
        """The verdict, and one line for each difference that names both sides."""
        compared = (
            f"{self.compared} metrics of the committed record, relative tolerance"
            f" {self.tolerance:g}"
        )
        if self.reproduced:
            return f"reproduced: {compared}; none differs"
        lines = [f"not reproduced: {compared}; {len(self.differences)} differ"]
        for kind, table in ("", self.differences), ("environment, ", self.environments):
            for name, (committed, rerun) in table.items():
                lines.append(f"{kind}{name}: committed {committed!r}, rerun {rerun!r}")
        return "\n".join(lines)


def reproduction(
    committed: TrialRecord, rerun: TrialRecord, tolerance: float = TOLERANCE
) -> Reproduction:
    """Compare a rerun with the committed record.

    Run times do not count, nor do metrics that only the rerun has.
    """
    tables = [
        {f"{m.name} {m.where}".strip(): m.value for m in each.metrics if m.name not in TIMES}
        for each in (committed, rerun)
    ]
    pairs = {name: (tables[0][name], tables[1].get(name)) for name in sorted(tables[0])}
    environments = {
        name: (value, getattr(rerun.environment, name))
        for name, value in vars(committed.environment).items()
    }
    return Reproduction(
        compared=len(pairs),
        tolerance=tolerance,
        differences={n: pair for n, pair in pairs.items() if not _close(*pair, tolerance)},
        environments={name: pair for name, pair in environments.items() if pair[0] != pair[1]},
    )


def _close(a: float, b: float | None, tolerance: float) -> bool:
    if b is None:
        return False
    if a == b or (math.isnan(a) and math.isnan(b)):
        return True
    return abs(a - b) <= tolerance * max(abs(a), abs(b))
