"""docs/extending.md runs as written, with one seed; extensions that fail are one clear line."""

import hashlib
import os
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedConfig

from example_records import diagnosis
from oasis_attn import (
    OasisConfig,
    UserError,
    convert,
    extension_files,
    register_branch_norm,
    register_null_signal,
    register_token_normalizer,
)
from oasis_attn.cli import main
from oasis_attn.extension_files import load_extensions
from oasis_attn.modeling.extensions import NULL_SIGNALS
from oasis_attn.modeling.settings import SETTINGS
from oasis_attn.records import Record, current_environment
from oasis_attn.study.plan_file import load_plan
from tiny_models import tiny_config, tiny_model

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


pytestmark = pytest.mark.usefixtures("own_extensions")


@pytest.fixture
def ids():
    return torch.randint(3, 90, (2, 11))


@pytest.fixture
def run(monkeypatch, capfd):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["oasis", *map(str, words)])
        return main(), capfd.readouterr()

    return run


def test_a_new_null_signal_is_trained_and_compared(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    for language, text in BLOCKS:
        if named := re.match(r"# (\w+\.(?:py|yaml))\n", text):
            Path(named[1]).write_text(text)
            if named[1] == "signals.yaml":  # each trial imports everything anew: one seed will do
                assert len(load_plan("signals.yaml").trials) == 4
                Path(named[1]).write_text(text.replace("seeds: [0, 1]", "seeds: [0]"))
        elif language == "sh":
            for line in text.splitlines():
                code, shown = run(*shlex.split(line)[1:])
                assert code == 0, shown.err
    assert Path("largest_head.py").read_text().count("\n") < 30
    assert "largest_head" in shown.out
    records = [Record.load(path) for path in Path("signals", "trials").glob("*.json")]
    assert len(records) == 2
    for record in [*records, Record.load("run/record.json")]:
        assert list(record.environment.extensions) == ["largest_head.py"]
    digest = record.environment.extensions["largest_head.py"]
    assert f"| largest_head.py | `{digest}` |" in Path("run", "README.md").read_text()
    assert {record.command.partition(" study ")[0] for record in records} == {
        "oasis --extension largest_head.py"
    }
    # The checkpoint does not contain the function, and loading it does not run the file.
    monkeypatch.setattr(extension_files, "_loaded", {})
    monkeypatch.delitem(NULL_SIGNALS._entries, "largest_head")
    code, shown = run("convert", "run", "--out", "out", "--to-vanilla")
    assert code == 2
    assert "null_signal: 'largest_head' is not one of off, on, shuffled" in shown.err
    assert "register it with register_null_signal, or load its file with --extension" in shown.err
    assert len(shown.err.splitlines()) == 1
    assert extension_files.loaded_extensions() == ()


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"][1:])
def test_the_other_examples_run(code):
    exec(compile(code, PAGE.name, "exec"), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\n1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("\nimport torch\n\ndef (\n", "line 4: SyntaxError: invalid syntax\n"),
        ("import json\njson.loads('{')\n", "line 2: JSONDecodeError: Expecting"),
        ("import sys\nsys.exit('done')\n", "line 2: SystemExit: done"),
        ("import absent_module\n", "line 1: ModuleNotFoundError: No module"),
        ("\0", "line 1: "),
        (
            "class E(Exception):\n    def __str__(self): return 1 / 0\nraise E\n",
            "line 3: E: its message cannot be shown (ZeroDivisionError)",
        ),
        (
            "from oasis_attn import register_null_signal as r\nr('on', abs)\n",
            "line 2: null_signal: 'on' is the library",
        ),
        (
            "from oasis_attn import register_null_signal as r\nr('a b', abs)\n",
            "line 2: null_signal: 'a b' is not a name",
        ),
        (
            "from oasis_attn import register_null_signal as r\nr('a', 1)\n",
            "line 2: null_signal: 1 is not a function",
        ),
    ],
)
def test_an_extension_that_fails_is_one_line(text, message, tmp_path, run):
    file = tmp_path / "broken.py"
    file.write_text(text)
    code, shown = run("--extension", file, "variants")
    assert code == 2
    assert shown.err.startswith(f"oasis: extension: '{file}', {message.partition(':')[0]}: ")
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.py", "'absent.py' cannot be read (No such file or directory)"),
        (".", "'.' cannot be read (Is a directory)"),
        ("", "'' cannot be read (Is a directory)"),
        ("a" * 5000, "cannot be read (File name too long)"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(path, message, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, shown = run("--extension", path, "variants")
    assert (code, shown.out) == (2, "")
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1


def test_two_files_of_one_name_are_refused(tmp_path, run):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "signals.py").write_text("")
    first, second = (tmp_path / folder / "signals.py" for folder in ("a", "b"))
    code, shown = run("--extension", first, "--extension", second, "variants")
    assert code == 2
    assert f"'{second}' has the name of a file that was run already" in shown.err


def test_an_extension_is_run_once_and_not_for_help(tmp_path, run, monkeypatch):
    files = [tmp_path / f"{name}.py" for name in ("first", "second", "third")]
    for file in files:
        file.write_text(f"with open({str(tmp_path / 'runs')!r}, 'a') as f: f.write('{file.stem} ')")
    monkeypatch.setenv("OASIS_EXTENSIONS", os.pathsep.join(map(str, files[:2])))
    given = ("--extension", files[1], "--extension", files[2])
    for words in (["--help"], ["study", "--help"], ["study", "run", "--help"], ["--version"]):
        assert run(*given, *words)[0] == 0
    assert not (tmp_path / "runs").exists()
    for words in (["variants"], ["study", "plans"]):
        assert run(*given, *words)[0] == 0
    load_extensions(files)
    assert (tmp_path / "runs").read_text() == "first second third "


def test_records_name_the_extensions_with_their_hashes(tmp_path, run):
    assert "extensions" not in diagnosis(environment=current_environment()).to_dict()["environment"]
    file = tmp_path / "signals.py"
    file.write_text("value = 1\n")
    assert run("--extension", file, "variants")[0] == 0
    record = diagnosis(environment=current_environment())
    hashes = {"signals.py": hashlib.sha256(b"value = 1\n").hexdigest()}
    assert record.to_dict()["environment"]["extensions"] == hashes
    assert Record.load(record.save(tmp_path / "record.json")) == record


def test_a_name_of_ones_own_may_be_registered_again():
    for factor in (1.0, 2.0):
        register_branch_norm("test_again", lambda x, _kind, factor=factor: x * factor)
    OasisConfig(branch_norm="test_again").check()
    with pytest.raises(UserError, match="branch_norm: 'none' is the library's"):
        register_branch_norm("none", abs)
    with pytest.raises(UserError, match="null_signal: 'off' is the library's"):
        register_null_signal("off", abs)


def test_there_are_at_most_ten_settings():
    assert len(SETTINGS) <= 10
    ours, theirs = (
        {field.name for field in fields(kind)} for kind in (OasisConfig, PreTrainedConfig)
    )
    assert ours - theirs - {"text_config", "tie_word_embeddings"} == set(SETTINGS)


@pytest.mark.parametrize(
    "signal",
    [
        lambda null, layer: null.mean(),  # noqa: ARG005
        lambda null, layer: null,  # noqa: ARG005
        lambda null, layer: null.mean(1, keepdim=True),  # noqa: ARG005
        lambda null, layer: 0.5,  # noqa: ARG005
        lambda null, layer: (None, None, None),  # noqa: ARG005
    ],
)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("residual", ["depth", "official"])
def test_psi_of_another_shape_is_one_line(signal, grad, residual, ids):
    register_null_signal("test_wrong", signal)
    model = tiny_model(null_signal="test_wrong", residual=residual)
    with torch.set_grad_enabled(grad), pytest.raises(UserError, match=r"in layer 0 it returned"):
        model(ids)


class Weighted(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.full((config.num_attention_heads,), 0.3))

    def forward(self, null_BHT, layer):  # noqa: ARG002
        return 0.1 + (null_BHT * self.weights.unsqueeze(-1)).sum(1)


def test_a_converted_model_has_the_parameters_of_its_signal(ids):
    register_null_signal("test_weighted", Weighted)
    native = LlamaForCausalLM(tiny_config()).eval()
    model = convert(native, null_signal="test_weighted")
    assert model.model.null_signal.weights.tolist() == pytest.approx([0.3] * 4)
    torch.testing.assert_close(model(ids).logits, native(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda: register_null_signal("x", torch.nn.Identity()), "Identity is an object"),
        (lambda: register_branch_norm("x", torch.nn.Identity), "a module or a class"),
        (
            lambda: register_token_normalizer("x", torch.nn.Identity, has_null=False),
            "only a function",
        ),
        (
            lambda: OasisConfig(token_normalizer={"name": "clipped_softmax", "gamma": -(10**400)}),
            "token_normalizer: gamma",
        ),
        (lambda: OasisConfig(token_normalizer={"name": "softmax1", 3: 1}), "3 is not the name"),
    ],
)
def test_what_cannot_be_registered_or_computed_is_one_line(register, message):
    with pytest.raises(UserError, match=message):
        register()
