"""The progress bar and the speed of a training run."""
# ruff: noqa: ARG002  the signatures are TrainerCallback's

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class Meter(TrainerCallback):
    """Counts tokens and seconds, and shows steps, loss, tokens/s and time left on standard error.

    If standard error is not a terminal, it prints a line after each tenth of the steps.  Use it as
    a context manager, so that the bar is closed if the run fails.

    Attributes:
        tokens: tokens trained on since the run was started or resumed.
        seconds: time in seconds that these tokens took.
    """

    def __init__(self, label: str, tokens_per_step: int, *, show: bool):
        self.label = label
        self.tokens_per_step = tokens_per_step
        self.tokens = 0
        self.seconds = 0.0
        self._started = 0.0
        console = Console(stderr=True, markup=False)
        self._say = console.print if show else None
        self._print = None if console.is_terminal else self._say
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not (show and console.is_terminal),
        )
        self._task = self._bar.add_task(label, state="")

    @property
    def tokens_per_second(self) -> float:
        """Mean speed over all steps so far, including logging and checkpoints."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line, after the training has ended."""
        if self._say:
            self._say(f"{self.label}: {text}")

    def on_train_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.tokens += self.tokens_per_step
        self.seconds = time.perf_counter() - self._started
        self._bar.update(self._task, completed=state.global_step)
        if state.global_step == state.max_steps:
            control.should_log = True

    def on_log(self, args, state, control, **kwargs):
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        text = f"loss {logs['loss']:.3f}  {self.tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, state=text)
        tenths = 10 * state.global_step // state.max_steps
        if (
            self._print
            and tenths > 10 * (state.global_step - args.logging_steps) // state.max_steps
        ):
            self._print(f"{self.label}: step {state.global_step} of {state.max_steps}  {text}")
