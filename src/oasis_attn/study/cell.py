"""One cell of a study: train, measure, quantise, evaluate; one record at the end, or none."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.errors import UserError
from oasis_attn.evaluation import evaluate
from oasis_attn.files import lock, write_bytes
from oasis_attn.measure import diagnose
from oasis_attn.modeling.loading import load_model
from oasis_attn.modeling.subject import describe_model
from oasis_attn.quantization import quantize, quantized_modules, schemes
from oasis_attn.records import Metric, TextInfo, TrainingRecord, TrialRecord
from oasis_attn.study.plan import Cell
from oasis_attn.study.text import HeldOut
from oasis_attn.training import train

TOLERANCE = 1e-6
"""Relative: what a rerun on the same processor, versions and threads may differ by."""
TIMES = ("cell.seconds", "cell.processor_seconds")
"""Metrics that tell how long a cell took; no rerun has the same."""
PATIENCE = 5.0
"""Seconds that a worker whose parent was killed has to end."""
_CHECKPOINTS = 4  # per training


@dataclass(kw_only=True)
class Work:
    """A trained model, what it is measured on, and the numbers so far."""

    cell: Cell
    trained: TrainingRecord
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: HeldOut
    metrics: list[Metric] = field(default_factory=list)
    tables: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)


def measured(work: Work) -> None:
    """Every measure of the model as it was trained: outlier.*, sink.*, depth.*, joint.*."""
    record = diagnose(
        work.model,
        work.text.measured_NT,
        windows=len(work.text.measured_NT),
        joint=True,
        causal=work.model.config.residual == "depth",  # where there are sources to drop
        data=work.text.data,
    )
    work.metrics += record.metrics
    work.tables |= record.tables


def evaluated(work: Work) -> None:
    """The tasks, in float."""
    work.metrics += _tasks(work.cell, work.model, work.tokenizer)


def quantized(work: Work) -> None:
    """Perplexity and tasks of the model under each scheme, as `NAME@SCHEME`."""
    for scheme in work.cell.schemes:
        batches = work.text.calibration_NT.split(1) if schemes()[scheme].needs_calibration else None
        twin = quantize(work.model, scheme, calibration=batches)
        record = diagnose(twin, work.text.measured_NT, windows=len(work.text.measured_NT))
        kept = [record.metric(name) for name in ("perplexity.windowed", "loss.windowed")]
        kept += _tasks(work.cell, twin, work.tokenizer)
        work.metrics += [replace(metric, name=f"{metric.name}@{scheme}") for metric in kept]
        work.targets[scheme] = len(quantized_modules(twin))


STEPS: tuple[Callable[[Work], None], ...] = (measured, evaluated, quantized)


def run_cell(cell: Cell, path: Path, work: Path, *, command: str) -> TrialRecord:
    """The record of `cell`, made if `path` does not hold it yet.

    Killed at any moment, it leaves no record; started again, it trains on from its last checkpoint
    to the same numbers.

    Args:
        path: of the record, written last and whole.
        work: a folder for what is needed on the way; removed at the end.
        command: that makes this cell again, for the record.

    Raises:
        UserError: another process is at work on this cell; what its steps find wrong.
    """
    with lock(work.with_name(f"{work.name}.lock"), f"cell {cell.id!r}", patience=PATIENCE):
        if path.is_file():
            return TrialRecord.load(path)
        started, processor = time.monotonic(), time.process_time()
        torch.set_num_threads(cell.threads)
        state = _start(cell, work)
        for step in STEPS:
            step(state)
        times = (time.monotonic() - started, time.process_time() - processor)
        state.metrics += [Metric(name=n, value=t) for n, t in zip(TIMES, times, strict=True)]
        record = _record(state, command)
        record.save(path)
        shutil.rmtree(work)
    return record


def _start(cell: Cell, work: Path) -> Work:
    config = cell.training_config(work, resume=True)
    if "save_every" not in cell.training:
        rows = max(1, config.steps // (_CHECKPOINTS * config.log_every))
        config = replace(config, save_every=rows * config.log_every)
    draws = work / "random.pt"
    if (work / "record.json").is_file() and not draws.is_file():
        shutil.rmtree(work)  # killed between the two
    work.mkdir(parents=True, exist_ok=True)
    try:
        trained = train(config, progress=False)
    except UserError as error:
        if not str(error).startswith("resume:"):
            raise
        # What a killed process left there is of no use.
        shutil.rmtree(work)
        work.mkdir()
        trained = train(config, progress=False)
    model, tokenizer = load_model(work)
    _draw_on(draws)
    if torch.cuda.is_available():
        nn.Module.to(model, "cuda")
    text = HeldOut(
        cell.corpus,
        config.eval_split,
        tokenizer=tokenizer,
        length=config.block_length,
        windows=cell.windows,
    )
    return Work(cell=cell, trained=trained, model=model, tokenizer=tokenizer, text=text)


def _draw_on(path: Path) -> None:
    """Random numbers as in a run that was not cut short after training: the shuffled null signal
    takes some while it is measured."""
    if path.is_file():
        processor, *devices = torch.load(path)
        torch.set_rng_state(processor)
        torch.cuda.set_rng_state_all(devices)
    else:
        stream = io.BytesIO()
        torch.save([torch.get_rng_state(), *torch.cuda.get_rng_state_all()], stream)
        write_bytes(path, stream.getvalue())


def _tasks(cell: Cell, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Metric]:
    if not cell.tasks:
        return []
    record = evaluate(model, tokenizer, tasks=cell.tasks, **cell.evaluation)
    return [metric for metric in record.metrics if not metric.where]


def _record(work: Work, command: str) -> TrialRecord:
    cell, trained = work.cell, work.trained
    return TrialRecord(
        model=replace(describe_model(work.model), name=cell.id, variant=cell.row),
        trial=cell.to_dict(),
        command=command,
        trained_parameters=trained.trained_parameters,
        targets=work.targets,
        tokenizer_sha256=trained.data.tokenizer_sha256,
        train=trained.data.train,
        train_corpus_sha256=trained.data.corpus_sha256,
        data=TextInfo.of(work.text.measured_NT, work.text.data),
        calibration_windows=len(work.text.calibration_NT),
        seed=cell.seed,
        metrics=(trained.metric("training.loss"), *work.metrics),
        tables={"loss": trained.tables["loss"]} | work.tables,
    )


def differences(record: TrialRecord, again: TrialRecord, tolerance: float = TOLERANCE) -> list[str]:
    """Metrics of a record that a rerun lacks, or has otherwise by more than `tolerance`, relative.

    How long a cell took is no part of it, nor what the rerun alone measures.  What else the
    records are of, commit, versions or hardware, is told at the end where it differs and so may be
    why.
    """
    tables = [
        {(m.name, m.where): m.value for m in each.metrics if m.name not in TIMES}
        for each in (record, again)
    ]
    found = []
    for name, where in sorted(tables[0]):
        a, b = (table.get((name, where)) for table in tables)
        same = a == b or (a is not None and b is not None and a != a and b != b)
        if a is not None and b is not None and not same:
            same = abs(a - b) <= tolerance * max(abs(a), abs(b))
        if not same:
            found.append(f"{name} {where}".strip() + f": {a!r} and {b!r}")
    for name, value in vars(record.environment).items() if found else ():
        other = getattr(again.environment, name)
        if other != value:
            found.append(f"{name} of the records: {value} and {other}")
    return found
