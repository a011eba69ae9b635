"""What the verbs share: printing tables and JSON, and showing that work goes on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from oasis_attn.errors import UserError, parse_json, shown

if TYPE_CHECKING:
    from rich.status import Status

    from oasis_attn.report import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model. Without it, a model that needs its own"
        " code is refused.",
    ),
]


def pair(option: str, text: str) -> tuple[str, Any]:
    """`name=value`, the value read as JSON where it is JSON: numbers, true, null."""
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise UserError(f"{option}: {shown(text)} is not NAME=VALUE")
    try:
        return name, parse_json(value)
    except ValueError:
        return name, value


def print_json(value: Any) -> None:
    """Print `value` as standard JSON; numbers not finite become the strings float() reads."""
    standard = json.loads(json.dumps(value), parse_constant=str)
    print(json.dumps(standard, indent=1))


def print_table(table: Table) -> None:
    """Print `table` on standard output: names to the left, numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    grid = Grid(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(table.columns):
        justify: Literal["left", "right"] = "left" if index < table.words else "right"
        grid.add_column(column, justify=justify, overflow="fold")
    for row in table.rows:
        grid.add_row(*row)
    Console(markup=False).print(grid)


def working(what: str) -> Status:
    """While open, show on standard error that `what` is going on."""
    from rich.console import Console

    return Console(stderr=True).status(escape(what))
