"""Importing is cheap, and the Auto classes know our checkpoints whoever is imported first."""

import subprocess
import sys

import pytest

from tiny import tiny_model


def python(code, *args):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("first", ["oasis_attn", "transformers"])
def test_auto_classes_know_a_checkpoint(checkpoint, first):
    second = {"oasis_attn": "transformers", "transformers": "oasis_attn"}[first]
    code = f"""
import sys, {first}, {second}
from transformers import AutoConfig, AutoModelForCausalLM
print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
"""
    assert python(code, checkpoint).splitlines()[-2:] == ["OasisConfig", "OasisForCausalLM"]


def test_importing_pulls_in_nothing_heavy():
    code = """
import sys, oasis_attn
print([m for m in ("torch", "transformers", "datasets", "matplotlib") if m in sys.modules])
"""
    assert python(code) == "[]"


def test_public_names():
    import oasis_attn

    for name in oasis_attn.__all__:
        assert getattr(oasis_attn, name) is not None
    with pytest.raises(AttributeError, match="nothing_here"):
        oasis_attn.nothing_here  # noqa: B018
