from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import MISSING, fields

import pytest
from typer.main import get_command

from oasis_attn import __version__
from oasis_attn.cli import app
from oasis_attn.cli.terminal import print_table
from oasis_attn.metrics import GLOSSARY
from oasis_attn.modeling.variants import variants
from oasis_attn.report import Table
from oasis_attn.study.demo import run_demo
from oasis_attn.study.doctor import doctor as run_doctor
from oasis_attn.training import TrainingConfig

COMMANDS = (
    *("convert", "demo", "diagnose", "doctor", "evaluate", "export", "metrics", "prefix"),
    *("quantize", "report", "train", "variants", "view"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(oasis, command) -> None:
    code, (out, _) = oasis(command, "--help")
    assert code == 0
    assert f"Example: oasis {command}" in " ".join(out.split())
    assert "--json" in out


def test_help_is_readable_at_80_columns(oasis, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in COMMANDS:
        out = oasis(command, "--help")[1].out
        assert "…" not in out, command  # a name that is cut off
        assert "<bool>" not in out, command  # a flag takes no value
        assert max(map(len, out.splitlines())) <= 80
    for command in ("convert", "export", "prefix", "quantize"):
        lines = oasis(command, "--help")[1].out.splitlines()
        assert f"Usage: oasis {command} [OPTIONS] MODEL" in map(str.strip, lines)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_destination_is_an_option(command) -> None:
    """Of `oasis study`, some subcommands read an existing folder, which is an argument."""
    for parameter in get_command(app).commands[command].params:
        if parameter.name == "out":
            assert parameter.opts == ["--out"]


def test_short_help_is_the_same(oasis) -> None:
    for words in ([], ["train"], ["study", "run"]):
        assert oasis(*words, "-h") == oasis(*words, "--help")


def test_version(oasis) -> None:
    assert oasis("--version") == (0, (f"oasis-attn {__version__}\n", ""))


def test_variants_as_json_are_the_library_s(oasis) -> None:
    code, (out, _) = oasis("variants", "--json")
    assert code == 0
    assert json.loads(out) == variants()


def test_variants_as_a_table_name_each(oasis) -> None:
    code, (out, _) = oasis("variants")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines() if line.strip()} >= set(variants())


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], [each.name for each in GLOSSARY]),
        (["sink.rate@0.2"], ["sink.rate@<eps>"]),
        (["outlier.kurtosis"], ["outlier.kurtosis"]),
        (["speed."], ["speed.over_unquantized"]),
        (["perplexity.windowed@w4a4"], ["perplexity.windowed@<scheme>"]),
    ],
)
def test_metrics_are_the_glossary_s(oasis, words, names) -> None:
    code, (out, _) = oasis("metrics", *words, "--json")
    assert code == 0
    assert [each["name"] for each in json.loads(out)] == names
    code, (out, _) = oasis("metrics", *words)
    assert code == 0
    assert names[0] in out


def test_train_has_an_option_for_every_field_with_its_default() -> None:
    options = {p.name: p.default for p in get_command(app).commands["train"].params}
    for field in fields(TrainingConfig):
        assert field.name in options
        if field.default is not MISSING:
            assert options[field.name] == field.default, field.name


def test_demo_s_options_are_parameters_of_the_library_s_with_their_defaults() -> None:
    parameters = inspect.signature(run_demo).parameters
    options = {p.name: p.default for p in get_command(app).commands["demo"].params}
    for name in options.keys() - {"out", "as_json"}:
        assert options[name] == parameters[name].default, name


def test_doctor_s_options_are_parameters_of_the_library_s_with_their_defaults() -> None:
    parameters = inspect.signature(run_doctor).parameters
    options = {p.name: p.default for p in get_command(app).commands["doctor"].params}
    for name in options.keys() - {"model", "out", "scheme_option", "apply", "as_json"}:
        assert options[name] == parameters[name].default, name


def test_help_comes_without_the_heavy_libraries() -> None:
    words = [[], *([command] for command in COMMANDS), ["study"], ["study", "run"]]
    code = f"""
import sys
from oasis_attn.cli import main
for words in {words!r}:
    sys.argv = ["oasis", *words, "--help"]
    main()
heavy = {{"torch", "transformers", "matplotlib", "datasets"}} & set(sys.modules)
sys.exit(str(heavy) if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_module_runs_as_the_command() -> None:
    words = [sys.executable, "-m", "oasis_attn", "bogus"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, "oasis: No such command 'bogus'.\n")


@pytest.mark.parametrize("width", [80, 200])
def test_a_wide_table_is_printed_in_parts(monkeypatch, capsys, width) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    columns = ("model", *(f"metric {i}" for i in range(12)))
    rows = tuple((name, *(f"{i}.000" for i in range(12))) for name in ("vanilla", "oasis"))
    print_table(Table(title="Wide", columns=columns, rows=rows))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= width
    parts = 2 if width == 80 else 1
    for name in ("vanilla", "oasis"):
        found = [words[1:] for words in map(str.split, lines) if words[:1] == [name]]
        assert len(found) == parts
        assert [word for words in found for word in words] == list(rows[0][1:])


def test_a_table_without_column_names_has_no_header(capsys) -> None:
    print_table(Table(title="Facts", columns=("", ""), rows=(("a", "1"),)))
    assert [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()] == [
        "Facts",
        "a   1",
    ]
