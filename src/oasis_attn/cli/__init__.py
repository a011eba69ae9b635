"""The command `oasis`: one file per verb; each parses, calls the library and prints.

Verb modules import the library inside the verb, so that `oasis --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from typing import Annotated

import typer
from typer import Exit, Option

from oasis_attn import __version__
from oasis_attn.cli.convert import convert
from oasis_attn.cli.demo import demo
from oasis_attn.cli.diagnose import diagnose
from oasis_attn.cli.evaluate import evaluate
from oasis_attn.cli.metrics import metrics
from oasis_attn.cli.prefix import prefix
from oasis_attn.cli.quantize import quantize
from oasis_attn.cli.study import study
from oasis_attn.cli.train import train
from oasis_attn.cli.variants import variants
from oasis_attn.errors import UserError, shown
from oasis_attn.files import refusal

INTERRUPTED = 130
_LONGEST = 3000  # letters of a message

app = typer.Typer(
    name="oasis",
    epilog="Start with: oasis demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, Option("--version", help="Say which version this is.")] = False,
) -> None:
    """Attention with a null option, and depth routing that listens to it."""
    if version:
        print(f"oasis-attn {__version__}")
        raise Exit


for verb in (demo, diagnose, convert, train, evaluate, prefix, quantize, variants, metrics):
    app.command()(verb)
app.add_typer(study)


def _one_line(message: str) -> str:
    """`message` on one line, cut in the middle where what the user gave makes it long."""
    line = " ".join(message.split())
    half = _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[:half]} ... {line[-half:]}"


def _drop_output() -> None:
    """Let what is still to be printed go nowhere, for standard output takes no more."""
    with suppress(OSError, ValueError):  # no file: replaced by the caller
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> int:
    """Run one verb and return its exit code.

    0 is success, 2 bad input (one line on stderr says which), 130 an interruption; anything else
    that goes wrong is a bug and keeps its traceback.
    """
    # What is going on is told by the verbs; the libraries below would tell it again, in bars, and
    # of kernels for other machines that do not load on this one.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        code = app(prog_name="oasis", standalone_mode=False) or 0
        sys.stdout.flush()
    except (UserError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if message:
            print(f"oasis: {_one_line(message)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        _drop_output()
        return 1
    except OSError as error:
        if (reason := refusal(error)) is None:
            raise
        _drop_output()
        where = "" if error.filename is None else f": {shown(error.filename)}"
        print(f"oasis: {reason}{where}", file=sys.stderr)
        return 2
    if code == INTERRUPTED:
        print("oasis: interrupted", file=sys.stderr)
    return code
