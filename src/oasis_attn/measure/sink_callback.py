"""Log attention sinks and outliers of a model while the Trainer of transformers trains it."""
# ruff: noqa: ARG002  the signatures are TrainerCallback's

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback

from oasis_attn.data import Windows, as_windows
from oasis_attn.errors import MOST, UserError, check_whole
from oasis_attn.hub.model_info import check_lengths
from oasis_attn.hub.prefix import prefix_of
from oasis_attn.measure.depth import Depth
from oasis_attn.measure.hooks import find_hook_points
from oasis_attn.measure.loss import loss_metrics
from oasis_attn.measure.outliers import Outliers
from oasis_attn.measure.sinks import Sinks
from oasis_attn.measure.stream import stream

EVERY = 100
"""Default number of steps between measurements."""
_WINDOWS = 4  # at most so many rows of the training data are measured
_SHARE = 20  # one measured row for at least so many rows that a process trains on


class SinkCallback(TrainerCallback):
    """Measures the model at the start and every `every` steps, and logs the numbers of `diagnose`.

    `trainer.add_callback(SinkCallback(trainer))` works with any Trainer of transformers.  The
    numbers go through `trainer.log` to all services in its `report_to`, under their names in the
    glossary: `sink.*`, `outlier.*`, `null.mass`, `depth.*` (the mean weight of source i is
    `depth.weight/source.i`) and the loss, all on the same windows.

    A measurement is a forward pass in eval mode, with the autocast of the Trainer.  Training is
    bit-identical with and without it: random states, gradients and modes do not change.  With
    several processes, each runs the pass, because a sharded model needs all of them, and the first
    one reports.

    Cost: by default, the windows are the first rows of the training data, at most 4 and at most
    1/20 of the rows that a process trains on in `every` steps, but at least one.  So under 5 % of
    the tokens are measured, once `every` * batch size * gradient accumulation is at least 20, and a
    forward pass takes about a third of the time of a training pass.

    Args:
        trainer: the Trainer whose model is measured.
        every: steps between measurements.
        tokens: what to measure on, instead of the training data: rows of token ids of one length
            ([N, T]), or `Windows`.  Their number determines the cost.

    Raises:
        UserError: the model cannot be diagnosed; the tokens make no windows, or longer ones than
            the model has positions; without `tokens`, rows of the training data that cannot be
            indexed or have no `input_ids`.  Families whose attention cannot be observed are refused
            by the measurement at the start.
    """

    def __init__(self, trainer: Trainer, *, every: int = EVERY, tokens: Any = None):
        check_whole("every", every, 1)
        self._trainer, self._every = trainer, every
        model = self._model
        find_hook_points(model)
        if tokens is None:
            arguments = trainer.args
            rows = every * arguments.train_batch_size * arguments.gradient_accumulation_steps
            tokens = _first_rows(trainer.train_dataset, min(max(rows // _SHARE, 1), _WINDOWS))
        embedding: Any = model.get_input_embeddings()
        read = as_windows(
            tokens,
            tokenizer=None,
            window=None,
            windows=MOST,
            vocab_size=embedding.weight.shape[0],
        )
        check_lengths(model, read.ids_NT.shape[1:], "tokens")
        self.windows: Windows = read

    @property
    def _model(self) -> PreTrainedModel:
        model: Any = self._trainer.model
        return model

    def measure(self) -> dict[str, float]:
        """The metrics of the Trainer's model now, by name; the values of `diagnose`."""
        model = self._model
        points = find_hook_points(model)
        outliers, sinks, depth = (
            Outliers(points),
            Sinks(points, prefixed=prefix_of(model) is not None),
            Depth(),
        )
        batches = self.windows.ids_NT.to(model.device).split(self._trainer.args.train_batch_size)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self._trainer.accelerator.autocast():
            losses_N = stream(
                model,
                points,
                batches,
                attention=sinks.update,
                output=outliers.update,
                depth=depth.update,
                after=lambda _: sinks.check(model),
            )
        metrics = (
            *loss_metrics(losses_N), *sinks.metrics(), *outliers.metrics(), *depth.metrics(),
        )  # fmt: skip
        values = {metric.name: metric.value for metric in metrics if not metric.where}
        weights = (metric for metric in metrics if metric.name == "depth.weight")
        return values | {f"{metric.name}/{metric.where}": metric.value for metric in weights}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._log(control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self._every == 0:
            self._log(control)

    def _log(self, control: Any) -> None:
        due = control.should_log
        self._trainer.log(self.measure())
        control.should_log = due  # a log clears it, but that of the loss is still to come


def _first_rows(dataset: Any, rows: int) -> list[Tensor]:
    """The first rows of a dataset without padding, cut to the length of the shortest."""
    if not (isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")):
        raise UserError(
            f"tokens: None needs training data that can be indexed, not {type(dataset).__name__};"
            " give rows of token ids"
        )
    found = [_ids(dataset[index]) for index in range(min(rows, len(dataset)))]
    length = min(map(len, found), default=0)
    return [ids_T[:length] for ids_T in found]


def _ids(row: Any) -> Tensor:
    ids, mask = row, None
    if isinstance(row, Mapping):
        if "input_ids" not in row:
            raise UserError(
                f"tokens: None needs training data with input_ids, but its rows have"
                f" {', '.join(row)}; give rows of token ids"
            )
        ids, mask = row["input_ids"], row.get("attention_mask")
    try:
        ids_T = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"tokens: None needs training data of token ids, not of {type(ids).__name__}; give rows"
            " of token ids"
        ) from error
    return ids_T if mask is None else ids_T[torch.as_tensor(mask).bool()]
