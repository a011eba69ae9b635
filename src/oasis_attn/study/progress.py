"""The live table of a study: a row for each variant, and how long it will still take."""

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

from oasis_attn.study.plan import Cell, Plan

if TYPE_CHECKING:
    from oasis_attn.study.folder import Status

_STATES = ("done", "running", "failed", "waiting")


class Board:
    """Shows a study on standard error; a line per cell that ends where that is no terminal.

    Args:
        plan: the study's.
        status: where it stood at the start.
        workers: cells at once.
        show: nothing at all, if False.
    """

    def __init__(self, plan: Plan, status: Status, *, workers: int, show: bool):
        self._console = Console(stderr=True, quiet=not show)
        self._plan, self._workers = plan, workers
        self._states = {cell.id: "waiting" for cell in plan.cells}
        self._states |= dict.fromkeys(status.done, "done")
        self._seconds: list[float] = []
        self._before = status.seconds_per_cell
        self._message = ""
        self._begun = time.monotonic()
        self._live = Live(self, console=self._console, auto_refresh=False, transient=False)
        self._terminal = self._console.is_terminal and show

    def __enter__(self) -> Board:
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

    def say(self, message: str) -> None:
        """What is going on besides cells."""
        self._message = message
        self.update()

    def started(self, cell: Cell) -> None:
        """Note that `cell` runs."""
        self._states[cell.id] = "running"

    def ended(self, cell: Cell, seconds: float, reason: str, *, resumed: bool) -> None:
        """Note that `cell` has ended; a reason means badly, `resumed` that it was begun before."""
        self._states[cell.id] = "failed" if reason else "done"
        if not reason and not resumed:  # else it tells nothing of how long a whole one takes
            self._seconds.append(seconds)
        if not self._terminal or reason:
            counts = Counter(self._states.values())
            ended = counts["done"] + counts["failed"]
            what = f"failed: {reason}" if reason else f"{seconds:.0f} s"
            line = f"{ended}/{len(self._states)}  {cell.id}  {what}  {self.time_left()}"
            self._console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)

    def update(self) -> None:
        """Draw it again."""
        if self._terminal:
            self._live.update(self, refresh=True)

    def time_left(self) -> str:
        """From the median of whole cells that ended well; empty before the first."""
        per_cell = median(self._seconds) if self._seconds else self._before
        counts = Counter(self._states.values())
        left = counts["waiting"] + counts["running"]
        if per_cell is None or not left:
            return ""
        minutes = round(per_cell * left / min(self._workers, left) / 60)
        return f"about {minutes // 60} h {minutes % 60:02} min left"

    def __rich__(self) -> Group:
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        grid.add_column(self._plan.name)
        for state in _STATES:
            grid.add_column(state, justify="right")
        rows: dict[str, Counter[str]] = {row: Counter() for row in self._plan.variants}
        for cell in self._plan.cells:
            rows[cell.row][self._states[cell.id]] += 1
        for row, counts in rows.items():
            grid.add_row(row, *(str(counts[state] or "") for state in _STATES))
        minutes, seconds = divmod(int(time.monotonic() - self._begun), 60)
        foot = f"{minutes}:{seconds:02} so far  {self.time_left()}  {self._message}"
        return Group(grid, Text(foot.rstrip(), style="dim"))
