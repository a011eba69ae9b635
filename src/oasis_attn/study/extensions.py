"""Run Python files that register null signals, branch norms or token normalisers."""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location

from oasis_attn.errors import UserError, shown


def load_extensions(paths: tuple[str, ...]) -> None:
    """Run each file once, so that the names that it registers can be used in a plan.

    Args:
        paths: paths of Python files; relative paths start at the current folder.

    Raises:
        UserError: a path is not a Python file.
    """
    for path in paths:
        if not (path.endswith(".py") and os.path.isfile(path)):
            raise UserError(
                f"extensions: {shown(path)} is not a Python file; relative paths start at the"
                " current folder"
            )
        _load(os.path.realpath(path))


@cache
def _load(path: str) -> None:
    name = f"oasis_attn_extension_{len(sys.modules)}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # classes of a module are found by its name
    spec.loader.exec_module(module)
