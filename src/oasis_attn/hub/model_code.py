"""The code of OASIS models as files next to a checkpoint, for processes without this library.

A `config.json` with `AUTO_MAP` tells transformers to import `modeling_oasis.py` from the folder of
the model, and the files that this one imports, after the user has trusted it:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`model_code` makes these files from the source of this package, so that there is no second
implementation.  Of every module it keeps the definitions that `OasisForCausalLM` reaches, as they
are written, with three changes:

- A module becomes a file in one flat folder, because transformers copies no others, and imports
  name the file that has the definition.
- Nothing is registered with the Auto classes, for which `AUTO_MAP` is.  The attention function is
  registered under a name of its own for each folder, because several models with code can be in one
  process.
- There are no compiled kernels: the functions of `ops.compiled` return None.

Where this library is imported, transformers prefers its classes, and runs no code of the folder.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oasis_attn.errors import UserError
from oasis_attn.files import write_text
from oasis_attn.modeling.configuration_oasis import ATTENTION, OasisConfig
from oasis_attn.modeling.extensions import BRANCH_NORMS, NULL_SIGNALS
from oasis_attn.modeling.hf_compat import has_adapter
from oasis_attn.modeling.pretrained import SAVE_HOOKS
from oasis_attn.ops.normalizers import TOKEN_NORMALIZERS

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedConfig, PreTrainedModel

_PACKAGE = Path(__file__).parent.parent
_ENTRY, _CLASS = "oasis_attn.modeling.modeling_oasis", "OasisForCausalLM"
_COMPILED = "oasis_attn.ops.compiled"
_WIDTH = 100  # of a line
AUTO_MAP = {
    "AutoConfig": "modeling_oasis.OasisConfig",
    "AutoModelForCausalLM": "modeling_oasis.OasisForCausalLM",
}
"""The field `auto_map` of a config whose model is saved with its code."""

_HEADER = """\
# From {module} of oasis-attn {version}, shortened to what the model uses.
# Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0
# Tested with {tested}.
"""
_FUTURE = "from __future__ import annotations\n\n"
_CRC = "from zlib import crc32\n"
_SHARED_NAME = f'ATTENTION = "{ATTENTION}"\n'
_OWN_NAME = f'ATTENTION = f"{ATTENTION}_{{crc32(__name__.encode()):08x}}"  # of this folder alone\n'
_FOOTER = """

# transformers finds the file of a class by this name: for both classes it is this file, because it
# would import another file, with what that one needs, from another folder.
OasisConfig.__module__ = __name__
"""


def check_code(config: PreTrainedConfig) -> None:
    """Raise `UserError` with the reason if `model_code` cannot compute a model with this config."""
    if not isinstance(config, OasisConfig):
        raise UserError(
            f"with_code: family {config.model_type!r} is one of transformers, which needs no code"
        )
    text: Any = config.text_config
    if any(getattr(part, "quantization_config", None) for part in (config, text)):
        raise UserError(
            "with_code: the model is quantized or has a prefix, which only this library loads;"
            " export the model from which it was made"
        )
    for name, value, own in (
        ("token_normalizer", config.normalizer.name, TOKEN_NORMALIZERS.own),
        ("branch_norm", config.branch_norm, {"none", *BRANCH_NORMS.own}),
        ("null_signal", config.null_signal, {"off", *NULL_SIGNALS.own}),
    ):
        if value not in own:
            raise UserError(
                f"with_code: {name} {value!r} is from an extension file, which is not part of the"
                " code; import oasis_attn and the extension where the model is loaded"
            )


def tested_versions() -> str:
    """The versions of torch and transformers that this library admits."""
    required = metadata.requires("oasis-attn") or []
    return " and ".join(x for x in required if re.match(r"(torch|transformers)\b[^;]*$", x))


@cache
def model_code() -> dict[str, str]:
    """The files, by name: see the docstring of this module."""
    reached = _reached()
    files = {f"{_file(name)}.py": _text(_module(name), reached) for name in sorted(reached)}
    (place,) = (name for name, text in files.items() if _SHARED_NAME in text)
    files[place] = files[place].replace(_SHARED_NAME, _OWN_NAME).replace(_FUTURE, _FUTURE + _CRC, 1)
    files[f"{_file(_ENTRY)}.py"] += _FOOTER
    return files


def write_code(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Write the files next to a model whose config has an `auto_map`, unless it is an adapter."""
    config = getattr(model, "oasis_config", None)
    if getattr(config, "auto_map", None) and not has_adapter(model):
        for name, text in model_code().items():
            write_text(Path(folder) / name, text)


SAVE_HOOKS.append(write_code)


@dataclass
class _Module:
    """A module of this package, in parts.

    Attributes:
        name: the whole name.
        definitions: name -> the statement that defines it; `__doc__` is the docstring.
        effects: the statements that define nothing, which run when the module is imported.
        segments: statement -> its text, with the comments before it and the docstring after it.
        ours, theirs: name -> where it is imported from: the module, and the name there, which is
            empty for a whole module.
        typing_only: the names that are imported for type checkers only.
    """

    name: str
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    effects: list[ast.stmt] = field(default_factory=list)
    segments: dict[ast.stmt, str] = field(default_factory=dict)
    ours: dict[str, tuple[str, str]] = field(default_factory=dict)
    theirs: dict[str, tuple[str, str]] = field(default_factory=dict)
    typing_only: set[str] = field(default_factory=set)

    def add_import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            name = alias.asname or alias.name
            if isinstance(node, ast.Import):
                self.theirs[name] = alias.name, ""
            elif str(node.module).split(".")[0] == "oasis_attn":
                self.ours[name] = str(node.module), alias.name
            else:
                self.theirs[name] = str(node.module), alias.name


@cache
def _module(name: str) -> _Module:
    """Read a module."""
    path = _PACKAGE.joinpath(*name.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    if name == _COMPILED:
        source = _returning_none(source)
    lines, end = source.splitlines(keepends=True), 0
    module, last = _Module(name), None
    for node in ast.parse(source).body:
        segment = "".join(lines[end : node.end_lineno])
        end = node.end_lineno or end
        if isinstance(node, ast.Import | ast.ImportFrom):
            module.add_import(node)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            before = {*module.ours, *module.theirs}
            for each in node.body:
                assert isinstance(each, ast.Import | ast.ImportFrom)
                module.add_import(each)
            module.typing_only |= {*module.ours, *module.theirs} - before
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "not TYPE_CHECKING":
            pass  # it defines at run time what the imports for type checkers name
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if last is not None:  # the docstring of a constant
                module.segments[last] += segment
            else:
                module.segments[node], module.definitions["__doc__"] = segment, node
        else:
            module.segments[node], last = segment, node
            names = set(_defined(node))
            module.definitions |= dict.fromkeys(names, node)
            if not names and not _registers_a_class(node):
                module.effects.append(node)
    return module


def _returning_none(source: str) -> str:
    """The source with functions that do nothing but return None."""
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list, node.body = [], [node.body[0], *ast.parse("return None").body]
    return ast.unparse(tree) + "\n"


def _registers_a_class(node: ast.stmt) -> bool:
    """Whether a statement is a call of `AutoModel.register` or another Auto class."""
    return re.match(r"Auto(Config|Model\w*)\.register\(", ast.unparse(node)) is not None


def _defined(node: ast.stmt) -> Iterator[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from _names(target)


def _names(node: ast.AST) -> set[str]:
    """The names that a piece of code uses, in type annotations too."""
    for each in ast.walk(node):
        if isinstance(each, ast.ImportFrom):
            inner = str(each.module).startswith("oasis_attn")
            assert not inner, f"{ast.unparse(each)}: it must be at the top of its module"
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def _home(module: str, name: str) -> tuple[str, str]:
    """The module that defines what `module` calls `name`, and the name there."""
    found = _module(module)
    while name not in found.definitions:
        if name in found.theirs:
            return found.theirs[name]
        module, name = found.ours[name]
        found = _module(module)
    return module, name


def _reached() -> dict[str, set[str]]:
    """The names of the definitions that the class reaches, by module."""
    reached: dict[str, set[str]] = {}
    todo = [(_ENTRY, _CLASS)]
    while todo:
        module, name = todo.pop()
        found = _module(module)
        nodes = [found.definitions[name]]
        if module not in reached:
            reached[module] = {"__doc__"}
            nodes += found.effects
        elif name in reached[module]:
            continue
        reached[module].add(name)
        for used in set().union(*map(_names, nodes)):
            if used in found.definitions:
                todo.append((module, used))
            elif used in found.ours:
                home, there = _home(*found.ours[used])
                if home.startswith("oasis_attn."):
                    todo.append((home, there))
    return reached


def _file(module: str) -> str:
    """The name of a module's file, without its suffix."""
    name = "_".join(module.split(".")[1:]).removeprefix("modeling_")
    return name if name.endswith("oasis") else f"oasis_{name}"


def _text(module: _Module, reached: dict[str, set[str]]) -> str:
    """The text of the file of a module."""
    kept = {module.definitions[name] for name in reached[module.name]} | set(module.effects)
    used = set().union(*map(_names, kept))
    header = _HEADER.format(
        module=module.name, version=metadata.version("oasis-attn"), tested=tested_versions()
    )
    docstring = module.segments[module.definitions["__doc__"]]
    imports = _imports(module, used)
    body = "".join(
        text for node, text in module.segments.items() if node in kept and text != docstring
    )
    return f"{header}{docstring}\n{_FUTURE}{imports}\n\n{body.lstrip()}"


def _imports(module: _Module, used: set[str]) -> str:
    """The import statements for the used names."""
    blocks: dict[bool, dict[str, list[str]]] = {False: {}, True: {}}  # by whether typing only
    for name, (home, there) in (module.theirs | module.ours).items():
        if name not in used or home == "__future__":
            continue
        if name in module.ours:
            home, there = _home(home, there)
            home = f".{_file(home)}" if home.startswith("oasis_attn.") else home
        block = blocks[name in module.typing_only]
        renamed = "" if name == (there or home) else f" as {name}"
        start = f"from {home} import" if there else "import"
        block.setdefault(start, []).append((there or home) + renamed)
    typing = "".join(_statement(*each, "    ") for each in blocks[True].items())
    if typing:
        blocks[False].setdefault("from typing import", []).append("TYPE_CHECKING")
        typing = f"\nif TYPE_CHECKING:\n{typing}"
    ours_last = sorted(blocks[False].items(), key=lambda each: each[0].startswith("from ."))
    return "".join(_statement(*each) for each in ours_last) + typing


def _statement(start: str, names: list[str], indent: str = "") -> str:
    if start == "import":
        return "".join(f"{indent}import {name}\n" for name in names)
    line = f"{indent}{start} {', '.join(names)}\n"
    if len(line) <= _WIDTH:
        return line
    listed = "".join(f"{indent}    {name},\n" for name in names)
    return f"{indent}{start} (\n{listed}{indent})\n"
