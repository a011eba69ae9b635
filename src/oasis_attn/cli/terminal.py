"""Functions that the commands share: printing results, parsing NAME=VALUE, progress."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from oasis_attn.errors import UserError, parse_json, shown

if TYPE_CHECKING:
    from oasis_attn.report import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Hub id, local folder, GGUF file, or [bold]smollm2[/bold]."
    ),
]

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that the checkpoint contains. Without this option, a model that"
        " requires such code is refused.",
    ),
]

Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        help="Where the model runs: auto (the GPU if there is one), cpu, cuda or cuda:N.",
    ),
]

_GAP = 3  # spaces between two columns
_MIN_TEXT_WIDTH = 20  # text columns are wrapped to no less than this


def pair(option: str, text: str) -> tuple[str, Any]:
    """Parse `NAME=VALUE`; a value that is JSON (a number, true, null) is decoded."""
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise UserError(f"{option}: {shown(text)} is not NAME=VALUE")
    try:
        return name, parse_json(value)
    except ValueError:
        return name, value


def pairs(option: str, texts: Sequence[str] | None) -> dict[str, Any]:
    """Parse the values of a repeatable option."""
    return dict(pair(option, text) for text in texts or ())


def print_json(value: Any) -> None:
    """Print `value` as standard JSON; numbers that are not finite become strings for float()."""
    standard = json.loads(json.dumps(value), parse_constant=str)
    print(json.dumps(standard, indent=1))


def print_table(table: Table) -> None:
    """Print `table` on standard output, text to the left and numbers to the right.

    A table without rows is not printed.  If the table is wider than the terminal, its columns are
    split into several tables, each with the key columns.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    if not table.rows:
        return
    console = Console(markup=False)
    for index, columns in enumerate(_split(table, console.width)):
        grid = Grid(
            title=table.title if not index else None,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            show_header=any(table.columns),
        )
        for column in columns:
            text = column < table.text_columns
            justify: Literal["left", "right"] = "left" if text else "right"
            grid.add_column(
                table.columns[column], justify=justify, overflow="fold", no_wrap=not text
            )
        for row in table.rows:
            grid.add_row(*(row[column] for column in columns))
        console.print(grid)


def print_sentences(title: str, sentences: Iterable[str]) -> None:
    """Print sentences under a title, one per paragraph, wrapped to the width of the terminal."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    console.print(title, style="italic")
    for sentence in sentences:
        console.print(sentence)


def print_saved(*saved: Path | None, purpose: str = "", command: Sequence[object] = ()) -> None:
    """Print in one line where the results are, and the next useful command with its purpose."""
    paths = ", ".join(str(path) for path in saved if path is not None)
    parts = [f"Saved: {paths}."] if paths else []
    if command:
        parts.append(f"To {purpose}: {shlex.join(map(str, command))}")
    if parts:
        print(f"\n{' '.join(parts)}")


def print_servable(folder: Path) -> None:
    """Print where a model is that engines load without this library, and how to serve it."""
    command = "vllm", "serve", folder.absolute(), "--dtype", "bfloat16"
    print_saved(folder, purpose="serve it", command=command)


def _split(table: Table, console_width: int) -> list[list[int]]:
    """The columns of each table to print: the key columns, then as many others as fit."""
    widths = [
        max(len(text) for row in (table.columns, *table.rows) for text in [row[column]])
        for column in range(len(table.columns))
    ]
    keys = list(range(table.key_columns))
    # Text can be wrapped; a number cannot.
    wrapped = [
        min(width, _MIN_TEXT_WIDTH) if column < table.text_columns else width
        for column, width in enumerate(widths)
    ]
    found = [keys.copy()]
    for column in range(table.key_columns, len(table.columns)):
        needed = sum(wrapped[each] + _GAP for each in (*found[-1], column))
        if needed > console_width and len(found[-1]) > len(keys):
            found.append(keys.copy())
        found[-1].append(column)
    return found


@contextmanager
def working(what: str, *, as_json: bool) -> Iterator[Callable[..., None]]:
    """Context in which a progress bar on standard error shows that `what` is in progress.

    It is shown on a terminal only, and not together with JSON.

    Yields:
        `report(step, done=0, total=None)`, which shows the current step and, if `total` is known,
        how many of the steps are done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=as_json or not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=None)

        def report(step: str, done: int = 0, total: int | None = None) -> None:
            bar.update(task, description=f"{what}: {step}", completed=done, total=total)

        yield report
