"""The compiled functions: whatever is wrong with them, the forward pass goes on without."""

import os
import subprocess
import sys

import pytest

from oasis_attn.ops import c_kernels


def load(caplog):
    caplog.clear()
    assert c_kernels.library.__wrapped__() is None
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    return record.getMessage()


@pytest.mark.parametrize("compiler", ["gcc '", "false", "/no/such/compiler"])
def test_a_command_that_does_not_work(compiler, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("OASIS_CACHE", str(tmp_path))
    assert "PyTorch operations replace them" in load(caplog)
    assert not list(tmp_path.iterdir())


def test_it_can_be_switched_off(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("OASIS_C_KERNELS", "0")
    monkeypatch.setenv("OASIS_CACHE", str(tmp_path))
    assert c_kernels.library.__wrapped__() is None
    assert not caplog.records
    assert not list(tmp_path.iterdir())


def test_one_line_says_that_it_was_built(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("OASIS_CACHE", str(tmp_path))
    with caplog.at_level("INFO", c_kernels.__name__):
        if c_kernels.library.__wrapped__() is None:
            pytest.skip("there is no C compiler")
        c_kernels.library.__wrapped__()  # from the cache: nothing is said
    (record,) = caplog.records
    assert str(tmp_path) in record.getMessage()


def test_a_cached_library_without_the_functions(monkeypatch, tmp_path):
    (tmp_path / "empty.c").write_text("int nothing;")
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-shared", "-fPIC", "-o", tmp_path / "empty.so", tmp_path / "empty.c"]
    try:
        subprocess.run(command, check=True)
    except OSError:
        pytest.skip("there is no C compiler")
    cache = tmp_path / "cache"
    monkeypatch.setenv("OASIS_CACHE", str(cache))
    if c_kernels.library.__wrapped__() is None:
        pytest.skip("there is no C compiler")
    (built,) = cache.iterdir()
    built.unlink()
    (tmp_path / "empty.so").rename(built)
    # In another process: the loader keeps what it has once loaded.
    code = "from oasis_attn.ops import c_kernels; print(c_kernels.library())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
    assert "undefined symbol" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_user_without_a_home_folder(monkeypatch, caplog):
    def no_home(_path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("OASIS_CACHE", raising=False)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr("pathlib.Path.expanduser", no_home)
    assert "Could not determine home directory" in load(caplog)
