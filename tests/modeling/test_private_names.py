"""Private and unstable names of dependencies stand in the two modules for them and nowhere else.

A test that fails here names the place, or what a release of a library has changed.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import oasis_attn
from oasis_attn.modeling import hf_compat

ROOT = Path(oasis_attn.__file__).parent
COMPATIBILITY = {"modeling/hf_compat.py", "ops/torch_compat.py"}
LIBRARIES = {
    *("torch", "transformers", "accelerate", "peft", "torchao", "lm_eval", "compressed_tensors"),
}
HOOKS = [(owner, name) for owner, names in hf_compat.OVERRIDDEN.items() for name in names]


# --- what our classes override


def named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


MODULES = [
    (path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8")))
    for path in sorted(ROOT.rglob("*.py"))
]


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*|__[A-Za-z]\w*(?<!__)", name) is not None


def assigned_on_self(tree: ast.AST) -> set[str]:
    """Names `x` of `self.x = ...` and `cls.x = ...`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("self", "cls")
    }


def defined_in(tree: ast.ClassDef | ast.Module) -> set[str]:
    """Names that the body of a class or module defines, imports aside."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {each.id for target in targets for each in names_in(target)}
    return found


def names_in(tree: ast.AST) -> list[ast.Name]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Name)]


def classes_in(tree: ast.AST) -> list[ast.ClassDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def overrides() -> set[str]:
    """Names of dependencies' classes that ours define anew: all private ones, and `HOOKS`."""
    listed, found = {name for _, name in HOOKS}, set()
    for path, tree in MODULES:
        if path.name == "__main__.py":
            continue
        try:
            module = import_module(".".join(("oasis_attn", *path.with_suffix("").parts)))
        except ModuleNotFoundError as error:
            if error.name != "triton":  # which is for GPUs
                raise
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                kind = getattr(module, node.name)
                own = defined_in(node) | assigned_on_self(node)
                theirs = set().union(*(names_of(base) for base in foreign_bases(kind)))
                found |= {name for name in own & theirs if is_private(name) or name in listed}
        for node in ast.walk(tree):  # type(name, bases, {...})
            found |= {key.value for key in keys_of_type(node) if is_private(key.value)}
    return found


def keys_of_type(node: ast.AST) -> list[ast.Constant]:
    """Names of the attributes in `type(name, bases, {...})`."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func) != "type" or len(node.args) != 3:
        return []
    keys = node.args[2].keys if isinstance(node.args[2], ast.Dict) else []
    return [key for key in keys if isinstance(key, ast.Constant)]


def foreign_bases(kind: type) -> list[type]:
    known = {"oasis_attn", *sys.stdlib_module_names}
    return [base for base in kind.__mro__ if base.__module__.split(".")[0] not in known]


@cache
def names_of(kind: type) -> set[str]:
    """All attributes of a class, those that its methods set on its objects included."""
    try:
        source = inspect.getsource(kind)
    except OSError:  # compiled
        source = ""
    assigned = assigned_on_self(ast.parse(textwrap.dedent(source)))
    return {*vars(kind), *vars(kind).get("__annotations__", {}), *assigned}


def test_names_that_we_override_are_listed():
    listed = {name for _, name in HOOKS}
    mixed_in = {"rename_source_key", "reverse_transform"}  # by classes that are made on demand
    assert overrides() == listed - mixed_in


@pytest.mark.parametrize(("owner", "name"), HOOKS, ids=[".".join(hook) for hook in HOOKS])
def test_a_name_that_we_override_exists_and_has_our_signature(owner, name):
    kind = named(owner)
    known = set().union(*(names_of(base) for base in foreign_bases(kind)))
    assert name in known, f"{owner} has no {name}"
    theirs = getattr(kind, name, None)
    if not inspect.isroutine(theirs):
        return
    wanted = [name for name in inspect.signature(theirs).parameters if name != "self"]
    for path, tree in MODULES:
        for node in classes_in(tree):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == name:
                    taken = method.args
                    known = [each.arg for each in [*taken.args, *taken.kwonlyargs]][1:]
                    open_ended = taken.vararg is not None or taken.kwarg is not None
                    message = f"{path}: {node.name}.{name} takes {known}, {owner}'s {wanted}"
                    assert open_ended or set(wanted) <= set(known) | {"kwargs"}, message
                    shared = [each for each in known if each in wanted]
                    assert shared == wanted[: len(shared)], message


# --- no private or unstable name elsewhere

DOCUMENTED = {  # modules that the documentation of our dependencies tells users to import from
    *("torch", "torch.nn", "torch.nn.functional", "torch.utils.data", "torch.utils.checkpoint"),
    *("torch.utils.hooks", "torch.autograd.function", "torch.nn.modules.module"),
    *("torch.nn.attention", "torch.nn.attention.flex_attention"),
    *("transformers", "transformers.modeling_outputs", "accelerate", "peft"),
    *("compressed_tensors.compressors", "compressed_tensors.quantization"),
}
DOCUMENTED_NAMES = {("transformers.utils", "logging"), ("transformers.utils", "ModelOutput")}
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}  # public, whatever they look like
BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}


def violations(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of each use of what belongs to a dependency and is private or unstable."""
    listed = {name for _, name in HOOKS}
    ours = defined_in(tree) | assigned_on_self(tree)
    ours = ours.union(*(defined_in(node) for node in classes_in(tree))) - listed
    standard: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            standard |= {alias.asname or alias.name for alias in node.names}
    standard = {name for name in standard if name in sys.stdlib_module_names}
    keys = [key for node in ast.walk(tree) for key in keys_of_type(node)]
    inside = {id(node): kind.name for kind in classes_in(tree) for node in ast.walk(kind)}

    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.expr | ast.stmt) else ""
        if isinstance(node, ast.Import):
            for alias in node.names:
                if not may_import(alias.name, None):
                    yield node.lineno, text
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if not may_import(str(node.module), alias.name):
                    yield node.lineno, text
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            root = ast.unparse(node.value)
            known = NAMED_TUPLE | ours
            if root in ("self", "cls", "super()") and id(node) in inside:
                known = NAMED_TUPLE | listed | inherited(inside[id(node)], tree)
            if node.attr not in known and root not in standard:
                yield node.lineno, text
        elif isinstance(node, ast.keyword) and node.arg is not None and is_private(node.arg):
            yield node.value.lineno, f"{node.arg}=..."
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in listed and node not in keys:
                yield node.lineno, repr(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            name = node.args[1]
            private = isinstance(name, ast.Constant) and is_private(name.value)
            if private and name.value not in written_by_name(tree):
                yield node.lineno, text


def may_import(module: str, name: str | None) -> bool:
    library = module.split(".")[0]
    if library == "oasis_attn" or library in sys.stdlib_module_names:
        return True
    if any(is_private(part) for part in [*module.split("."), name or ""]):
        return False
    public = module in DOCUMENTED or (module, name) in DOCUMENTED_NAMES
    return library not in LIBRARIES or public


def written_by_name(tree: ast.Module) -> set[str]:
    """Names `_x` that the module itself gives to objects: `vars(object)["_x"] = ...`."""
    return {
        node.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.slice, ast.Constant)
        and ast.unparse(node.value).startswith("vars(")
    }


def inherited(name: str, tree: ast.Module | None = None) -> set[str]:
    """What the classes of this name, and those of ours that they derive from, define."""
    found: set[str] = set()
    for kind in [*CLASSES.get(name, []), *(classes_in(tree) if tree else [])]:
        if kind.name == name:
            found |= defined_in(kind) | assigned_on_self(kind)
            found = found.union(*(inherited(ast.unparse(base)) for base in kind.bases))
    return found


CLASSES: dict[str, list[ast.ClassDef]] = {}
for _, _tree in MODULES:
    for _kind in classes_in(_tree):
        CLASSES.setdefault(_kind.name, []).append(_kind)
SOURCES = [(str(path), tree) for path, tree in MODULES if str(path) not in COMPATIBILITY]


@pytest.mark.parametrize(("path", "tree"), SOURCES, ids=[path for path, _ in SOURCES])
def test_no_private_name_of_a_dependency(path, tree):
    found = [f"{path}:{line}: {text}" for line, text in violations(tree)]
    assert not found, "belongs into modeling/hf_compat.py or ops/torch_compat.py: " + str(found)


@pytest.mark.parametrize(
    "code",
    [
        "from transformers.utils.output_capturing import OutputRecorder",
        "from transformers.masking_utils import sdpa_mask",
        "from transformers.utils import cached_file",
        "import transformers.integrations.moe",
        "from torch.utils._pytree import tree_map",
        "from transformers import _private",
        "from rich._inspect import Inspect",
        "import torch\ntorch._assert_async(x, 'y')",
        "import torch\ntorch.ops.aten._private.default",
        "import torch\ntorch._C._nothing",
        "model.config._attn_implementation",
        "model._no_split_modules",
        "super()._dequantize(model)",
        "class A(B):\n    def f(self):\n        return self._parameters",
        "class A(B):\n    def _save(self, trainer):\n        trainer._save()",
        "getattr(model, '_hf_peft_config_loaded', False)",
        "vars(model)['_apply'] = function",
        "cached_file(source, name, _raise_exceptions_for_missing_entries=False)",
    ],
)
def test_the_search_finds(code):
    assert list(violations(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(1)",
        "from transformers import PreTrainedModel\nfrom transformers.utils import logging",
        "score._asdict()",
        "class A:\n    def _own(self):\n        self._own()\n\ndef f(a):\n    a._own()",
        "class A(Trainer):\n    def _save(self):\n        super()._save()",
        "vars(x)['_mark'] = 1\ngetattr(x, '_mark', None)",
        "x.__class__ = y",
    ],
)
def test_the_search_lets_pass(code):
    assert not list(violations(ast.parse(code)))


# --- pins


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_a_pin_admits_the_tested_minor_version_only(library):
    project = tomllib.loads((ROOT.parent.parent / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    required = {re.split(r"[^\w-]", line)[0]: line for group in groups for line in group}
    name = library.replace("_", "-")
    pin = re.fullmatch(rf"{name}>=(\d+)\.(\d+)[\d.]*,<(\d+)\.(\d+)", required[name])
    assert pin, f"pyproject.toml: {required[name]}"
    least, below = (int(pin[1]), int(pin[2])), (int(pin[3]), int(pin[4]))
    assert below == (least[0], least[1] + 1), f"pyproject.toml: {required[name]}"
    constraints = (ROOT.parent.parent / "constraints.txt").read_text()
    tested = re.search(rf"^{name}==(\d+)\.(\d+)", constraints, re.MULTILINE)
    assert tested, f"constraints.txt: {name}"
    assert (int(tested[1]), int(tested[2])) == least
