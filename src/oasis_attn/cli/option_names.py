"""Errors of the library name parameters; errors of the command line should name options."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand

from oasis_attn.errors import UserError

_QUOTED = re.compile(r"('[^']*'|\"[^\"]*\")")


class Command(TyperCommand):
    """A command whose errors name its options: `--save-every` instead of `save_every`."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise UserError(self._with_options(str(error))) from error

    def _with_options(self, message: str) -> str:
        """Replace the parameter at the start, and others that contain an underscore."""
        options = {
            parameter.name: parameter.opts[-1]
            for parameter in self.params
            if parameter.name and parameter.opts[-1].startswith("--")
        }
        start = re.match(r"\w*", message)
        assert start is not None
        name, rest = start[0], message[start.end() :]
        if name in options and rest.startswith((":", "[", " (")):  # `learning_rates['router']: ...`
            name = options[name]
        compound = [each for each in options if "_" in each]
        if compound:
            pattern = re.compile(rf"\b({'|'.join(compound)})\b")
            parts = _QUOTED.split(rest)
            # Odd parts are quoted values, which stay as the user gave them.
            parts[::2] = [pattern.sub(lambda m: options[m[1]], part) for part in parts[::2]]
            rest = "".join(parts)
        return name + rest
