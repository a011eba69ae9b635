"""Registries: the named functions that a setting of `OasisConfig` selects; users can add more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from oasis_attn.errors import UserError, check_choice


def check_registered(setting: str, name: object, names: tuple[str, ...]) -> None:
    """Raise `UserError`, which explains how to register a function, unless `name` is in `names`."""
    try:
        check_choice(setting, name, names)
    except UserError as error:
        raise UserError(
            f"{error}; register it with register_{setting}, or load its file with --extension"
        ) from None


class Registry:
    """The functions that one setting can select.

    Args:
        setting: name of the setting.
        entries: the functions of the library, by name; they cannot be replaced.
    """

    def __init__(self, setting: str, entries: dict[str, Callable[..., Any]]):
        self.setting = setting
        self.own, self._entries = frozenset(entries), dict(entries)

    def register(self, name: str, entry: Callable[..., Any]) -> None:
        """Add `entry` as `name`, or replace it if the user has added it before.

        Raises:
            UserError: `name` is not an identifier or is a name of the library, or `entry` is not
                callable.
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
        check_registered(self.setting, name, (*others, *self))

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self._entries:
            self.check(name)
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
