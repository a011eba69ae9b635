"""Run a training: takes a config, saves a model folder, and returns a record."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from oasis_attn.data import collate
from oasis_attn.devices import find_device, is_out_of_memory
from oasis_attn.errors import UserError, parse_json, reason, shown
from oasis_attn.files import check_free, lock, write_text, writing
from oasis_attn.hub.model_card import write_card
from oasis_attn.modeling.hf_compat import TensorBoardCallback
from oasis_attn.modeling.pretrained import OasisPreTrainedModel
from oasis_attn.records import TrainingRecord
from oasis_attn.training.checkpoints import STAGING, check_same_run, last_checkpoint
from oasis_attn.training.config import TrainingConfig
from oasis_attn.training.prepare import prepare, whole_model
from oasis_attn.training.progress import Meter
from oasis_attn.training.result import save_model, training_record
from oasis_attn.training.trainer import OasisTrainer

_BETAS = (0.9, 0.95)


def train(
    config: TrainingConfig,
    *,
    progress: bool = True,
    callbacks: Sequence[Callable[[Trainer], TrainerCallback]] = (),
) -> TrainingRecord:
    """Train a model, save it with its tokenizer, measure the final loss, and save a record.

    The same config gives bit-identical losses on the same machine and thread count, whether or not
    the run was interrupted and resumed.  Runs that differ only in `variant` start from the same
    backbone weights and use the same batches.

    Several processes (`accelerate launch -m oasis_attn train ...`, DDP or FSDP2) share every step:
    two processes with half the `batch_size` give the losses of one, up to rounding.  The first
    process writes files and shows progress.

    Args:
        config: the configuration of the run.
        progress: show progress on standard error.
        callbacks: functions that take the Trainer and return a callback for it, as `SinkCallback`.

    Returns:
        Metrics: `loss.windowed` (nats per token) and `perplexity.windowed` on disjoint windows of
        `eval_split`, `training.loss` (the last row of the loss table) and
        `training.tokens_per_second`.  The table `loss` has rows of {step, loss, learning_rate,
        gradient_norm} and, if they apply, {outlier_penalty, null_logit (of Softmax1),
        null_factor}.  Loss and penalty are means since the previous row, the others are values at
        the step.  The record is saved as
        `out/record.json` after all other files.

    Raises:
        UserError: the input is invalid (nothing is written); `out` exists, or with `resume` belongs
            to another run; another process is training into `out`; the loss or gradient is not
            finite; the disk is full (free some space, then use `resume`).
    """
    out = Path(config.out)
    _begun(out, resume=config.resume)
    with ExitStack() as stack:
        stack.enter_context(_quiet_transformers())
        arguments = _arguments(config, out)  # initializes the processes of a distributed run
        processes = arguments.distributed_state
        if processes.is_main_process:
            place = out.resolve()
            stack.enter_context(lock(place.with_name(f".{place.name}.lock"), f"out: {str(out)!r}"))
        begun = _begun(out, resume=config.resume)  # again: another process may have ended since
        prepared = prepare(config, processes.num_processes)
        checkpoint = None
        if begun is not None:
            check_same_run(out, begun, prepared.identity)
            if (out / "record.json").is_file():
                return TrainingRecord.load(out / "record.json")
            checkpoint = last_checkpoint(out / "checkpoints", prepared.identity)
        processes.wait_for_everyone()  # all processes finish the checks before one writes
        if processes.is_main_process:
            shutil.rmtree(str(arguments.output_dir), ignore_errors=True)
            write_text(out / "run.json", json.dumps(prepared.identity, indent=1))
        meter = Meter(
            f"train {prepared.label}",
            arguments.train_batch_size
            * config.gradient_accumulation
            * config.block_length
            * processes.num_processes,
            show=progress and processes.is_main_process,
        )
        if processes.is_main_process and begun is None:
            stack.enter_context(_removed_if_refused(out, meter))
        with meter:
            trainer = OasisTrainer(
                model=prepared.model,
                args=arguments,
                train_dataset=prepared.blocks,
                data_collator=collate,
                callbacks=[meter, *prepared.callbacks],
                run=prepared.identity,
                tokenizer=prepared.tokenizer,
                rates=config.rates,
                penalty=config.outlier_penalty,
                penalized=config.outlier_tensors,
                teacher=prepared.teacher,
                distill_weight=config.distill_weight,
            )
            trainer.remove_callback(PrinterCallback)
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                    callback.logging_dir = str(out / "tensorboard")
            for make in callbacks:
                trainer.add_callback(make(trainer))
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            weights = trainer.gathered_weights()
        if processes.is_main_process:
            model = whole_model(config, prepared, weights)
            with writing(out):
                save_model(model, prepared.tokenizer, out)
            history = trainer.state.log_history
            meter.say(f"measuring the loss on {config.eval_windows} windows")
            record = training_record(
                *(config, prepared, model, history, meter.tokens_per_second),
                device=trainer.args.device,
            )
            record.save(out / "record.json")
            if isinstance(model, OasisPreTrainedModel):
                write_card(model, out)  # again, now with the measurements
        processes.wait_for_everyone()
    return TrainingRecord.load(out / "record.json")


def _begun(out: Path, *, resume: bool) -> dict[str, Any] | None:
    """The identity of the run in `out`; None for a new run, or one killed before it wrote it."""
    if not resume:
        check_free(out, hint=", or continue its run with resume=True")
        return None
    try:
        if out.is_dir() and all(path.name.startswith(".run.json.") for path in out.iterdir()):
            return None
        return dict(parse_json((out / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"resume: {shown(str(out))} contains no run to resume ({reason(error)})"
        ) from error


@contextmanager
def _removed_if_refused(out: Path, meter: Meter) -> Iterator[None]:
    """Context that removes the folder of a run if an error comes before the end of its first step.

    `prepare` does not check what the Trainer and the callbacks refuse.
    """
    try:
        yield
    except (UserError, RuntimeError) as error:
        refused = isinstance(error, UserError) or is_out_of_memory(error)
        if refused and not meter.tokens:
            shutil.rmtree(out, ignore_errors=True)
        raise


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _arguments(config: TrainingConfig, out: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out / "checkpoints" / STAGING),
        use_cpu=find_device(config.device).type == "cpu",
        max_steps=config.steps,
        seed=config.seed,
        data_seed=config.seed,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=find_device(config.device).type == "cuda",
        remove_unused_columns=False,
        learning_rate=config.rates["backbone"],
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(config.warmup * config.steps),
        optim="adamw_torch",
        adam_beta1=_BETAS[0],
        adam_beta2=_BETAS[1],
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        bf16=config.bf16,
        activation_checkpointing=config.activation_checkpointing,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_every,
        report_to=config.report_to or "none",
        run_name=out.name,
        disable_tqdm=True,
    )
