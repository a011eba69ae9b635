"""The live table of a running study: one row per variant, and the remaining time."""

from __future__ import annotations

import time
from collections import Counter
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from oasis_attn.report import number
from oasis_attn.study.plan import Plan, Trial

if TYPE_CHECKING:
    from oasis_attn.study.storage import Status

_STATES = ("done", "running", "failed", "waiting")


class ProgressTable:
    """Shows the progress on standard error: a live table, or a line per trial if not a terminal.

    Args:
        plan: the plan of the study.
        status: the progress at the start.
        workers: number of trials that run at once.
        show: show anything at all.
    """

    def __init__(self, plan: Plan, status: Status, *, workers: int, show: bool):
        self._console = Console(stderr=True, quiet=not show)
        self._plan, self._workers = plan, workers
        self._states = {trial.id: "waiting" for trial in plan.trials}
        self._states |= dict.fromkeys(status.done, "done")
        self._elapsed: list[float] = []
        self._earlier_seconds = status.seconds_per_trial
        self._message = ""
        self._started_at = time.monotonic()
        self._live = Live(self, console=self._console, auto_refresh=False, transient=False)
        self._terminal = self._console.is_terminal and show

    def __enter__(self) -> ProgressTable:
        if self._terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._terminal:
            self._live.stop()

    def set_message(self, message: str) -> None:
        """Show a message below the table."""
        self._message = message
        self.update()

    def trial_started(self, trial: Trial) -> None:
        """Show that `trial` is running."""
        self._states[trial.id] = "running"

    def trial_ended(
        self,
        trial: Trial,
        elapsed: float,
        *,
        seconds: float | None,
        reason: str,
        resumed: bool,
    ) -> None:
        """Show that `trial` has ended.

        Args:
            trial: the trial.
            elapsed: seconds since it was started, including the start of its process.
            seconds: its own run time, as in its record and in `oasis study status`; None if it
                failed.
            reason: the reason of its failure; empty if it succeeded.
            resumed: an earlier process had already run a part of it.
        """
        self._states[trial.id] = "failed" if reason else "done"
        if not reason and not resumed:  # only these are run times of a whole trial
            self._elapsed.append(elapsed)
        if not self._terminal or reason:
            counts = Counter(self._states.values())
            ended = counts["done"] + counts["failed"]
            outcome = f"failed: {reason}" if seconds is None else f"{number(seconds)} s"
            line = f"{ended}/{len(self._states)}  {trial.id}  {outcome}  {self.time_left()}"
            self._console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)

    def update(self) -> None:
        """Redraw the table."""
        if self._terminal:
            self._live.update(self, refresh=True)

    def time_left(self) -> str:
        """The remaining time, from the median of successful trials; empty if there are none."""
        per_trial = median(self._elapsed) if self._elapsed else self._earlier_seconds
        counts = Counter(self._states.values())
        left = counts["waiting"] + counts["running"]
        if per_trial is None or not left:
            return ""
        minutes = round(per_trial * left / min(self._workers, left) / 60)
        return f"about {minutes // 60} h {minutes % 60:02} min left"

    def __rich__(self) -> Group:
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        grid.add_column(self._plan.name)
        for state in _STATES:
            grid.add_column(state, justify="right")
        states: dict[str, Counter[str]] = {name: Counter() for name in self._plan.variants}
        for trial in self._plan.trials:
            states[trial.variant][self._states[trial.id]] += 1
        for variant, counts in states.items():
            grid.add_row(variant, *(str(counts[state] or "") for state in _STATES))
        minutes, seconds = divmod(int(time.monotonic() - self._started_at), 60)
        foot = f"{minutes}:{seconds:02} elapsed  {self.time_left()}  {self._message}"
        return Group(grid, Text(foot.rstrip(), style="dim"))
