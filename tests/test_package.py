"""Importing is cheap, and the Auto classes know our checkpoints whoever is imported first."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import tiny_model


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


@pytest.mark.parametrize(
    "imports",
    [
        "import oasis_attn",
        "from transformers import AutoModel; import oasis_attn",
        "import oasis_attn; from transformers import LlamaForCausalLM",
    ],
)
def test_auto_classes_know_a_checkpoint(checkpoint, imports):
    code = f"""
import sys
{imports}
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import AutoModelForSequenceClassification
for auto in AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification:
    print(type(auto.from_pretrained(sys.argv[1])).__name__)
"""
    assert python(code, checkpoint).splitlines()[-4:] == [
        "OasisConfig",
        "RoutedLlamaModel",
        "OasisForCausalLM",
        "OasisForSequenceClassification",
    ]


def test_importing_pulls_in_nothing_heavy():
    code = """
import sys, oasis_attn
print([m for m in ("torch", "transformers", "datasets", "matplotlib") if m in sys.modules])
"""
    assert python(code) == "[]"


def test_public_names_have_types(tmp_path):
    """Of none is the type Any, and a name that does not exist is an error, below the top too."""
    pytest.importorskip("mypy")
    import oasis_attn

    names = [name for name in oasis_attn.__all__ if name != "ops"]
    snippet = tmp_path / "snippet.py"
    snippet.write_text(
        f"from oasis_attn import ops, {', '.join(names)}\n"
        + "".join(f"reveal_type({name})\n" for name in [*names, "ops.null_attention"])
        + "reveal_type(diagnose(OasisForCausalLM(OasisConfig()), 'text').data.window)\n"
        + "reveal_type(convert('folder'))\n"
        + "reveal_type(OasisForCausalLM.from_pretrained('folder'))\n"
        + "from oasis_attn import nothing_here\n"
        + "from oasis_attn.quantization import nor_here\n"
    )
    options = (  # without the libraries beneath, it takes seconds
        *("--no-site-packages", "--ignore-missing-imports", "--follow-imports=silent"),
        *("--config-file=", f"--cache-dir={tmp_path}"),
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(snippet)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MYPYPATH": str(Path(oasis_attn.__file__).parent.parent)},
    )
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert len(revealed) == len(names) + 4, done.stdout + done.stderr
    assert "Any" not in revealed
    assert revealed[-3:] == ["int", *["oasis_attn.modeling.model.OasisForCausalLM"] * 2]
    # Without this file, type checkers take an installed package for untyped.
    assert Path(oasis_attn.__file__).with_name("py.typed").is_file()
    errors = re.findall(r"error: (.*)  \[", done.stdout)
    assert errors == [
        'Module "oasis_attn" has no attribute "nothing_here"',
        'Module "oasis_attn.quantization" has no attribute "nor_here"',
    ]


def test_public_names():
    import oasis_attn

    assert {*oasis_attn._HOMES, "ops", "__version__"} == {*oasis_attn.__all__}
    for name in oasis_attn.__all__:
        assert getattr(oasis_attn, name) is not None
    with pytest.raises(AttributeError, match="nothing_here"):
        oasis_attn.nothing_here  # noqa: B018
