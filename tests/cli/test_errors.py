"""What the commands say about bad input, and about errors while they run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer import Abort, Typer

from oasis_attn import cli
from oasis_attn.cli import main
from oasis_attn.errors import UserError
from oasis_attn.hub import loading


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bogus"], "'bogus'"),
        (["variants", "--bogus"], "--bogus"),
        (["train"], "--out: it is missing; see oasis train --help"),
        (["convert", "smollm2"], "--out: it is missing; see oasis convert --help"),
        (["prefix", "smollm2", "new"], "--out: it is missing; see oasis prefix --help"),
        (["export", "smollm2", "new"], "--out: it is missing; see oasis export --help"),
        (["train", "--out", "/"], "or continue its run with --resume"),
        (["convert", "smollm2", "--out", "/"], "--out: '/' exists; give a new folder or remove it"),
        (["prefix", "smollm2", "--out", "/"], "--out: '/' exists; give a new folder or remove it"),
        (["export", "smollm2", "--out", "/"], "--out: '/' exists; give a new folder or remove it"),
        (["view", "smollm2", "--text", "a", "b"], "(b); put a value that contains spaces in"),
        (["diagnose"], "MODEL: it is missing; see oasis diagnose --help"),
        (["train", "--out", "x", "--steps", "many"], "--steps: 'many' is not a whole number"),
        (["train", "--out", "x", "--learning-rate", "a"], "--learning-rate: 'a' is not a number"),
        (["train", "--out", "x", "--variant", "oasys"], "did you mean 'oasis'"),
        (["train", "--out", "x", "--size", "nani"], "did you mean 'nano'"),
        (["train", "--out", "x", "--from", "smollm2", "--size", "nano"], "--size: 'nano' has no"),
        (["train", "--out", "x", "--steps", "0"], "steps: 0"),
        (["train", "--out", "x", "--config", "null_logit"], "--config: 'null_logit'"),
        (["train", "--out", "x", "--corpus", "sdtlib"], "did you mean 'stdlib'"),
        (["diagnose", "./absent"], "./absent"),
        (["diagnose", "smollm2", "--corpus", "pydok"], "did you mean 'pydoc'"),
        (["diagnose", "smollm2", "--text", "a.txt"], "'a.txt' is the name of a file; give it as"),
        (["diagnose", "smollm2", "--text", " "], "--text: it is empty"),
        (["diagnose", "smollm2", "--text", "a", "--text-file", "a.txt"], "either --text or --text"),
        (
            ["diagnose", "smollm2", "--text", "a", "--split", "test"],
            "--split: 'test' has no effect",
        ),
        (["diagnose", "smollm2", "--text-file", "absent.txt"], "--text-file: file 'absent.txt'"),
        (["demo", "--device", "gpu"], "--device: 'gpu' is not one of auto, cpu, cuda, cuda:N"),
        (["view", "smollm2", "--text", "a b", "--device", "cuda:-1"], "--device: 'cuda:-1' is not"),
        (["demo", "--windows", "0"], "windows: 0"),
        (["doctor", "smollm2", "--tolerance", "-1"], "tolerance: -1"),
        (["doctor", "smollm2", "--scheme", "w8a9"], "scheme: 'w8a9' is not one of"),
        (["doctor", "smollm2", "--scheme-option", "bits=4"], "oasis: --scheme-option: 'bits' is"),
        (["doctor", "smollm2", "--out", "/proc/x"], "out: '/proc/x'"),
        (["doctor", "smollm2", "--apply", "/proc/x"], "--apply: '/proc/x'"),
        (["metrics", "sink.rat@0.3"], "did you mean 'sink.rate@<eps>'"),
        (
            ["study", "run", "absent.yaml", "--out", "x"],
            "'absent.yaml' cannot be read (No such file",
        ),
        (["metrics", "zzz"], "metric: 'zzz' is unknown; `oasis metrics` lists all"),
        (
            ["train", "--out", "x", "--save-every", "7"],
            "--save-every: 7 is not a multiple of --log-every",
        ),
        (["demo", "--seed", "9" * 23], "seed: 9"),
        (["train", "--out", "x", "--learning-rate", "1e38"], "--learning-rate: 1e+38"),
        (["train", "--out", "x", "--learning-rate", "inf"], "--learning-rate: inf"),
        (["train", "--out", "x", "--learning-rate", "nan"], "--learning-rate: nan"),
        (["train", "--out", "x", "--rate", "router=1e38"], "--rate['router']: 1e+38"),
        (["train", "--out", "x", "--weight-decay", "inf"], "--weight-decay: inf"),
        (["train", "--out", "x", "--seed", "-1"], "seed: -1"),
        (["train", "--out", "x", "--seed", "9" * 23], "seed: 9"),
        (["train", "--out", "x", "--steps", "9" * 23], "steps: 9"),
        (["train", "--out", "x", "--vocab-size", "9" * 23], "--vocab-size: 9"),
        (["train", "--out", "/proc/x/y"], "out: '/proc/x/y' cannot be written"),
        (["evaluate", "smollm2", "--tasks", "arith", "--temperature", "inf"], "temperature: inf"),
        (
            ["evaluate", "smollm2", "--tasks", "arith", "--temperature", "1e-9"],
            "temperature: 1e-09",
        ),
        (["evaluate", "smollm2", "--tasks", "arith", "--seed", "9" * 23], "seed: 9"),
        (["evaluate", "smollm2", "--tasks", "arith", "--out", "/proc/x"], "out: '/proc/x'"),
        (["evaluate", "smollm2", "--tasks", "arith", "--samples", "/proc/x"], "samples: '/proc/x"),
        (["diagnose", "smollm2", "--corpus", "pydoc", "--out", "/proc/x/y"], "out: '/proc/x/y'"),
        (["diagnose", "smollm2", "--corpus", "pydoc", "--out", "/dev/null"], "not a regular file"),
        (["diagnose", "smollm2", "--corpus", "pydoc", "--figures", "/proc/x"], "figures: '/proc/x"),
        (["diagnose", "smollm2", "--corpus", "a" * 5000], "is not one of"),
        (["quantize", "smollm2", "--out", "/proc/x"], "out: '/proc/x'"),
        (["quantize", "smollm2", "--out", "x", "--seed", "-1"], "seed: -1"),
        (["quantize", "smollm2", "--out", "a" * 5000], "File name too long"),
        (["quantize", "smollm2", "--out", "x", "--calibration", "imbd"], "--calibration (or a"),
        (["doctor", "smollm2", "--evaluation-split", "dev"], "--evaluation-split (of"),
        (["convert", "smollm2", "--out", "/proc/x"], "--out: '/proc/x'"),
        (["export", "smollm2", "--out", "/proc/x"], "--out: '/proc/x'"),
        (["export", "smollm2", "--out", "/proc/x.gguf"], "--out: '/proc/x.gguf'"),
        (["prefix", "smollm2", "--out", "/proc/x"], "--out: '/proc/x'"),
        (["demo", "--out", "/proc/x"], "out: '/proc/x'"),
        (["study", "run", "smoke", "--out", "/proc/x"], "out: '/proc/x'"),
        (["study", "status", "[/x]"], "'[/x]' contains no plan.yaml"),
    ],
)
def test_bad_input_is_one_line_and_code_2_and_writes_nothing(
    oasis, monkeypatch, tmp_path: Path, words, message
) -> None:
    monkeypatch.chdir(tmp_path)
    code, (out, err) = oasis(*words)
    assert code == 2
    assert out == ""
    assert err.startswith("oasis: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_bug_keeps_its_traceback(monkeypatch) -> None:
    monkeypatch.setattr(cli, "app", _app(RuntimeError("ours")))
    monkeypatch.setattr(sys, "argv", ["oasis", "verb"])
    with pytest.raises(RuntimeError, match="ours"):
        main()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("x: 1\nis not 2"), 2, "oasis: x: 1 is not 2\n"),
        (KeyboardInterrupt(), 130, "oasis: interrupted\n"),
        (Abort(), 130, "oasis: interrupted\n"),
        (PermissionError(13, "", "x"), 2, "oasis: Permission denied: 'x'\n"),
    ],
)
def test_an_error_in_a_command(oasis, monkeypatch, error, code, line) -> None:
    monkeypatch.setattr(cli, "app", _app(error))
    assert oasis("verb") == (code, ("", line))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
)
def test_a_full_gpu_is_one_line_that_names_a_remedy(oasis, monkeypatch, model, error) -> None:
    def check_runs(_model: object) -> None:
        raise error

    monkeypatch.setattr(loading, "_check_runs", check_runs)
    line = f"oasis: the memory of the GPU is full; run it with --device cpu ({error})"
    code, (out, err) = oasis("diagnose", model, "--text", "w3 w4 w5")
    assert (code, out, err.splitlines()[-1]) == (2, "", line)


def test_a_full_disk_is_reported_in_one_line() -> None:
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "oasis_attn", "variants", "--json"]
        ended = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, "oasis: No space left on device\n")


def _app(error: BaseException) -> Typer:
    broken = Typer()

    @broken.callback()
    def group() -> None: ...

    @broken.command()
    def verb() -> None:
        raise error

    return broken


WRONG = [
    ["bogus"],
    ["convert", "smolm2", "--out", "new"],
    ["convert", "smollm2", "--out", "new", "--dtype", "flot32"],
    ["convert", "smollm2", "--out", "new", "--config", "residual=dept"],
    ["convert", "smollm2", "--out", "new", "--config", "null_logit=high"],
    ["convert", "smollm2", "--out", "new", "--variant", "authors"],
    ["demo", "--steps", "0"],
    ["demo", "--pretrained", "./absent"],
    ["diagnose", "./absent"],
    ["diagnose", "smollm2", "--corpus", "imbd"],
    ["diagnose", "smollm2", "--split", "dev"],
    ["diagnose", "smollm2", "--text-file", "absent.txt"],
    ["diagnose", "smollm2", "--windows", "0"],
    ["doctor", "smolm2"],
    ["doctor", "smollm2", "--apply", "."],
    ["doctor", "smollm2", "--calibration", "imbd"],
    ["doctor", "smollm2", "--scheme", "w4a5"],
    ["doctor", "smollm2", "--windows", "0"],
    ["evaluate", "./absent"],
    ["evaluate", "smollm2", "--corpus", "arith", "--k", "2"],
    ["evaluate", "smollm2", "--corpus", "arith", "--kv-bits", "3"],
    ["evaluate", "smollm2", "--tasks", "bogus"],
    ["export", "smollm2", "--out", "new", "--format", "ggf"],
    ["export", "smollm2", "--out", "new", "--weights", "q8_0"],
    ["export", "smollm2", "--out", "new.gguf", "--weights", "q8"],
    ["metrics", "bogus"],
    ["prefix", "smollm2", "--out", "new", "--length", "0"],
    ["prefix", "smollm2", "--out", "new", "--method", "gredy"],
    ["prefix", "smollm2", "--out", "new", "--scheme", "w4a16"],
    ["quantize", "smollm2", "--out", "new", "--calibration", "imbd"],
    ["quantize", "smollm2", "--out", "new", "--scheme", "w8a8-static-full"],
    ["quantize", "smollm2", "--out", "new", "--scheme", "w4a5"],
    ["quantize", "smollm2", "--out", "new", "--scheme-option", "weight.bitz=3"],
    ["quantize", "smollm2", "--out", "new", "--sensitivity", "layers"],
    ["quantize", "smollm2", "--out", "new", "--skip", "x"],
    ["study", "plans", "smok"],
    ["study", "run", "smok", "--out", "new"],
    ["study", "run", "smoke", "--out", "new", "--cluster", "slurn"],
    ["study", "run", "smoke", "--out", "new", "--workers", "0"],
    ["study", "status", "absent"],
    ["study", "table", "absent"],
    ["study", "trial", "smoke", "absent"],
    ["study", "trial", "smoke", "absent", "--out", "new.json"],
    ["train", "--out", "."],
    ["train", "--out", "new", "--config", "null_logits=1"],
    ["train", "--out", "new", "--config", "token_normalizer=softmaxx"],
    ["train", "--out", "new", "--corpus", "misspelt"],
    ["train", "--out", "new", "--eval-split", "dev"],
    ["train", "--out", "new", "--from", "smolm2"],
    ["train", "--out", "new", "--report-to", "wanb"],
    ["train", "--out", "new", "--log-sinks-every", "10"],
    ["train", "--out", "new", "--size", "nanoo"],
    ["train", "--out", "new", "--variant", "misspelt"],
    ["train", "--out", "new", "--vocab-size", "0"],
    ["variants", "--bogus"],
]


def test_wrong_names_are_refused_without_the_heavy_libraries(tmp_path) -> None:
    code = f"""
import sys
from oasis_attn.cli import main
for words in {WRONG!r}:
    sys.argv = ["oasis", *words]
    code = main()
    heavy = {{"torch", "transformers", "datasets", "matplotlib"}} & set(sys.modules)
    if code != 2 or heavy:
        sys.exit(f"{{words}}: code {{code}}, imports {{heavy or 'nothing'}}")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == len(WRONG)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize", "x", "--out", "y", "--skip", "z"], "such option; did you mean '--ignore'?"),
        (["quantize", "smollm2", "--out", "x", "--costs", "y"], "did you mean '--sensitivity'?"),
        (["train", "--out", "x", "--set", "y=1"], "did you mean '--config'?"),
        (["train", "--out", "x", "--lr", "1"], "did you mean '--learning-rate'?"),
        (["study", "run", "smoke", "--out", "x", "--reuse", "y"], "did you mean '--reuse-from'?"),
        (["evaluate", "smollm2", "--bits", "4"], "no such option; did you mean '--kv-bits'?"),
        (["evaluate", "--model", "smollm2"], "--model: no such option; --help lists all"),
        (["variants", "--zzz"], "--zzz: no such option; --help lists all"),
        (["convert", "smollm2", "--out", "x", "--variant", "authors"], "did you mean 'official'?"),
    ],
)  # fmt: skip
def test_natural_names_of_options_get_a_hint(oasis, words, message) -> None:
    code, (_, err) = oasis(*words)
    assert code == 2
    assert message in err
