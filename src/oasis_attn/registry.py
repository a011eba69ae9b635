"""Named functions that a setting of `OasisConfig` may choose, and that users may add to."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

from oasis_attn.errors import UserError, check_choice, shown


class Registry:
    """The values of one setting.

    Args:
        setting: its name, for messages.
        entries: those of the library; they cannot be replaced.
    """

    def __init__(self, setting: str, entries: dict[str, Callable[..., Any]]):
        self.setting = setting
        self.own, self._entries = frozenset(entries), dict(entries)

    def register(self, name: str, entry: Callable[..., Any]) -> None:
        """Add `entry` as `name`; a user's own entry of that name is replaced.

        Raises:
            UserError: the name is the library's, or no identifier; the entry cannot be called.
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(f"{self.setting}: {name!r} is not a name of letters, digits and _")
        if name in self.own or name in ("off", "none"):
            raise UserError(f"{self.setting}: {name!r} is the library's; choose another name")
        if not callable(entry):
            raise UserError(f"{self.setting}: {entry!r} is not a function")
        self._entries[name] = entry

    def check(self, name: object, *others: str) -> None:
        """Raise `UserError` unless `name` is registered, or one of `others`."""
        try:
            check_choice(self.setting, name, (*others, *self))
        except UserError as error:
            raise UserError(f"{error}; --extension FILE loads a file that registers more") from None

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self._entries:
            self.check(name)
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def load_extensions(paths: Iterable[str]) -> None:
    """Run Python files that register null signals, branch norms or token normalisers, once each.

    Args:
        paths: paths of Python files; relative paths start at the current folder.

    Raises:
        UserError: a path is not a Python file, or the file fails; the message has its line.
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
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)]
        line = error.lineno if isinstance(error, SyntaxError) and error.lineno else lines[-1]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"extensions: {shown(path)} fails in line {line}: {what}") from error
