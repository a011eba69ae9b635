"""Importing is cheap, packages import downwards, and the order of imports makes no difference."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import oasis_attn
from tiny_models import tiny_model

ROOT = Path(oasis_attn.__file__).parent
LAYERS = [  # as in CONTRIBUTING.md
    {"cli"},
    {"study"},
    {"report"},
    {"lab"},
    {"training", "measure", "quantization", "evaluation"},
    {"data"},
    {"hub"},
    {"modeling"},
    {"ops"},
    {"records", "metrics", "registry", "extension_files"}
    | {"progress", "lazy", "files", "devices", "errors"},
]


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


def test_importing_models_prints_nothing():
    """The warnings of torchao are hidden; others of the same loggers are not."""
    code = """
import logging, oasis_attn, transformers.quantizers.auto
logging.getLogger("torchao").warning("Failed to load a model")
logging.getLogger("torch.utils._pytree").warning("another")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0] == "Failed to load a model"
    assert lines[1].endswith("another")


def test_importing_pulls_in_nothing_heavy():
    code = """
import sys, oasis_attn
print([m for m in ("torch", "transformers", "datasets", "matplotlib") if m in sys.modules])
"""
    assert python(code) == "[]"


def test_public_names_have_types(tmp_path):
    """Of none is the type Any, and a name that does not exist is an error, below the top too."""
    pytest.importorskip("mypy")
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
    assert revealed[-3:] == ["int", *["oasis_attn.modeling.modeling_oasis.OasisForCausalLM"] * 2]
    # Without this file, type checkers take an installed package for untyped.
    assert Path(oasis_attn.__file__).with_name("py.typed").is_file()
    errors = re.findall(r"error: (.*)  \[", done.stdout)
    assert errors == [
        'Module "oasis_attn" has no attribute "nothing_here"',
        'Module "oasis_attn.quantization" has no attribute "nor_here"',
    ]


def test_public_names():
    assert {*oasis_attn._HOMES, "ops", "__version__"} == {*oasis_attn.__all__}
    for name in oasis_attn.__all__:
        assert getattr(oasis_attn, name) is not None
    with pytest.raises(AttributeError, match="nothing_here"):
        oasis_attn.nothing_here  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    [
        "import oasis_attn.modeling.modeling_oasis",
        "import oasis_attn.modeling.pretrained",
        "from transformers import AutoModel; import oasis_attn",
    ],
)
def test_a_saved_model_has_its_card_whatever_was_imported(tmp_path, imports):
    code = f"""
import sys
{imports}
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from transformers import LlamaConfig
size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
OasisForCausalLM(OasisConfig(text_config=LlamaConfig(**size, vocab_size=64))).save_pretrained(
    sys.argv[1]
)
"""
    stale = tmp_path / "prefix" / "adapter_config.json"  # of a model that was here before
    stale.parent.mkdir()
    stale.touch()
    python(code, tmp_path)
    assert "variant `oasis` of" in (tmp_path / "README.md").read_text()
    assert not stale.exists()


def imports(path: Path) -> set[str]:
    """The packages and modules of ours, one level below the top, that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module
            found |= {
                oasis_attn._HOMES.get(alias.name, f"oasis_attn.{alias.name}")
                if node.module == "oasis_attn"
                else node.module
                for alias in node.names
            }
    found.discard("oasis_attn.__version__")
    return {name.split(".")[1] for name in found if name.startswith("oasis_attn.")}


def test_packages_import_only_what_is_below_them():
    level = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        ours = path.relative_to(ROOT).with_suffix("").parts[0]
        if ours in ("__init__", "__main__", "_registration"):
            continue
        assert ours in level, f"{ours} is in no layer"
        for theirs in imports(path) - {ours}:
            lowest = level[ours] == len(LAYERS) - 1
            if level.get(theirs, -1) < level[ours] + (not lowest):
                wrong.append(f"{path.relative_to(ROOT)} imports {theirs}")
    assert not wrong
