"""How long functions report their progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A function that is called at the start of each step of a long computation."""

    def __call__(self, step: str, done: int = 0, total: int | None = None) -> None:
        """Show the progress.

        Args:
            step: what is being done.
            done: number of steps that are complete.
            total: number of all steps; None if it is not known.
        """


def no_progress(step: str, done: int = 0, total: int | None = None) -> None:
    """Show nothing."""


class Steps:
    """Reports the steps of a computation with a known maximum number of steps."""

    def __init__(self, progress: Progress, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def start(self, step: str) -> None:
        """Report that the next step starts."""
        self._progress(step, self._done, self._total)
        self._done += 1

    def skip_to(self, done: int) -> None:
        """Leave out steps that were not necessary, so that `done` steps are complete."""
        self._done = done
