"""Random command lines for every command: success, or an error of one line with exit code 2.

Commands stop where they would load or train a model, so that all checks before are real.
"""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.main import get_command

from oasis_attn.cli import app, main
from oasis_attn.data.corpora import Corpus
from oasis_attn.errors import UserError

STOPS = {
    "evaluation.run": "load_model",
    "hub.convert": "load_model",
    "hub.loading": "load_model",
    "measure.sink_conversion": "load_model",
    "quantization.export_checkpoint": "load_model",
    "quantization.quantize_checkpoint": "load_model",
    "quantization.prefix_checkpoint": "load_model",
    "study.demo": "load_model",
    "study.doctor": "load_model",
    "study.run": "run_study",
    "study.trial": "run_trial",
    "training.run": "prepare",
}
NUMBERS = ["0", "1", "2", "-1", "1.5", "1e38", "inf", "-inf", "nan", "9" * 23, "1e-320", "", "x"]
NAMES = ["oasis", "vanilla", "nano", "stdlib", "smollm2", "arith,perplexity", "w4a4", "smoke"]
PLACES = [".", "/", "new", "file", "file/x", "/proc/x/y", "/dev/null", "a" * 5000, "folder", "[/x]"]
PAIRS = ["x", "=", "null_logit=Infinity", "weight.bits=2.5", "router=1e38", "null=NaN", "router=x",
         "rotation=hadamard", "x=" + "[" * 5000, "depth_block_size=" + "9" * 5000]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from([*NUMBERS, *NAMES, *PLACES, *PAIRS]),
    st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), max_size=6),
    st.integers().map(str),
    st.floats().map(str),
)
TYPED = {
    int: st.one_of(st.integers(0, 64), st.integers()).map(str),
    float: st.one_of(st.floats(0, 2), st.floats()).map(str),
}


def values(parameter):
    """Mostly values of the right type, so that the later checks are reached, too."""
    typed = TYPED.get(parameter.type_descriptor.annotation, VALUES)
    return st.one_of(typed, typed, typed, VALUES)


def all_commands():
    """The words that call each command -> its parameters."""
    found = {}
    for name, command in get_command(app).commands.items():
        if hasattr(command, "commands"):
            found |= {(name, part): each.params for part, each in command.commands.items()}
        else:
            found[(name,)] = command.params
    return found


COMMANDS = all_commands()


@st.composite
def command_lines(draw):
    command = draw(st.sampled_from(sorted(COMMANDS)))
    words = [] if draw(st.integers(0, 9)) else ["--extension", draw(VALUES)]
    words += command
    for parameter in COMMANDS[command]:
        if parameter.param_type_name == "argument":
            if draw(st.integers(0, 9)):
                value = draw(VALUES)
                words.append(f"./{value}" if value.startswith("-") else value)
        elif parameter.name != "exit_with_parent" and draw(st.integers(0, 9)) < (
            9 if parameter.required else 2
        ):
            option = draw(st.sampled_from(parameter.opts))
            words.append(option if parameter.is_flag else f"{option}={draw(values(parameter))}")
    return words


def stop(*_args, **_options):
    raise UserError("stopped before the work begins")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory that contains a file and a folder."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "file").write_text("x\n")
    (folder / "folder").mkdir()
    (folder / "folder" / "train.txt").write_text("text")
    # Import all modules before any is patched: they import these functions from each other.
    modules = {module: import_module(f"oasis_attn.{module}") for module in STOPS}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OASIS_CACHE", str(folder / "cache"))
        patch.setattr(Corpus, "sha256", "0")
        patch.setattr("oasis_attn.hub.locate.ask_hub", lambda *_: True)
        # The commands are made once, which takes longer than to read a command line.
        patch.setattr("typer.main.get_command", cache(get_command))
        for module, name in STOPS.items():
            patch.setattr(modules[module], name, stop)
        yield folder


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(words=command_lines())
def test_a_command_line_succeeds_or_fails_with_one_line(place, words):
    before = {path.name for path in place.iterdir()}
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["oasis", *words])
        code = main()
    assert code in (0, 2)
    if code:
        last = err.getvalue().splitlines()[-1]
        assert last.startswith("oasis: ")
        assert len(last) < 4000
        assert out.getvalue() == ""
    assert {path.name for path in place.iterdir()} == before
