"""The command `oasis`: one file per subcommand, which parses, calls the library and prints.

Each command imports the library inside its function, so that `oasis --help` is fast, and checks
cheap arguments before it imports torch and transformers.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Annotated

import typer
from typer import Exit, Option

from oasis_attn import __version__
from oasis_attn.cli.command import Command, Group
from oasis_attn.cli.convert import convert
from oasis_attn.cli.demo import demo
from oasis_attn.cli.diagnose import diagnose
from oasis_attn.cli.doctor import doctor
from oasis_attn.cli.evaluate import evaluate
from oasis_attn.cli.export import export
from oasis_attn.cli.metrics import metrics
from oasis_attn.cli.prefix import prefix
from oasis_attn.cli.quantize import quantize
from oasis_attn.cli.report import report
from oasis_attn.cli.study import study
from oasis_attn.cli.train import train
from oasis_attn.cli.variants import variants
from oasis_attn.cli.view import view
from oasis_attn.errors import UserError, shown
from oasis_attn.extension_files import EXTENSIONS_VARIABLE
from oasis_attn.files import refusal

INTERRUPTED = 130
_MAX_MESSAGE_LENGTH = 3000

app = typer.Typer(
    name="oasis",
    cls=Group,
    epilog="Start with: oasis demo",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def top(
    ctx: typer.Context,
    version: Annotated[bool, Option("--version", help="Print the version and exit.")] = False,
    extension: Annotated[
        list[str] | None,
        Option(
            metavar="FILE",
            help="Run a Python file before the command, to register null signals, branch norms or"
            " token normalizers; repeatable. Paths in OASIS_EXTENSIONS are run first.",
        ),
    ] = None,
) -> None:
    """Attention with a null option, and depth routing that uses the null probability."""
    if version:
        print(f"oasis-attn {__version__}")
        raise Exit
    paths = os.environ.get(EXTENSIONS_VARIABLE, "").split(os.pathsep)
    ctx.obj = [*filter(None, paths), *(extension or ())]  # `Command` runs these files


for command in (
    *(demo, diagnose, doctor, view, convert, train, evaluate, prefix, quantize),
    *(export, report, variants, metrics),
):
    app.command(cls=Command)(command)
app.add_typer(study)


def _one_line(message: str) -> str:
    """`message` on one line; a long one is shortened in the middle."""
    line = " ".join(message.split())
    half = _MAX_MESSAGE_LENGTH // 2
    return line if len(line) <= _MAX_MESSAGE_LENGTH else f"{line[:half]} ... {line[-half:]}"


def _discard_output() -> None:
    """Discard buffered output, because standard output cannot be written."""
    with suppress(OSError, ValueError):  # standard output was replaced and has no file descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> int:
    """Run one command and return its exit code.

    The code is 0 for success, 2 for bad input (one line on standard error names it) and 130 for an
    interruption.  Any other error is a bug and keeps its traceback.
    """
    # The commands show their own progress and errors.  Silence those of the libraries: progress
    # bars, and lines about requests that are repeated.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = app(prog_name="oasis", standalone_mode=False) or 0
        sys.stdout.flush()
    except (UserError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if message:
            print(f"oasis: {_one_line(message)}", file=sys.stderr)
        return 2
    except typer.Abort:  # at a question
        code = INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return 1
    except OSError as error:
        if (reason := refusal(error)) is None:
            raise
        _discard_output()
        where = "" if error.filename is None else f": {shown(error.filename)}"
        print(f"oasis: {reason}{where}", file=sys.stderr)
        return 2
    if code == INTERRUPTED:
        print("oasis: interrupted", file=sys.stderr)
    return code
