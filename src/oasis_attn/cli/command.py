"""What all commands do: show help, run the extension files first, and name options in errors."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from oasis_attn.devices import is_out_of_memory
from oasis_attn.errors import UserError, nearest, one_line, shown
from oasis_attn.extension_files import load_extensions

_QUOTED = re.compile(r"('[^']*'|\"[^\"]*\")")

_SYNONYMS = {  # natural names -> the option that may be meant, for error messages
    "bits": "scheme",
    "context": "window",
    "costs": "sensitivity",
    "data": "corpus",
    "dataset": "corpus",
    "epochs": "steps",
    "exclude": "ignore",
    "file": "text-file",
    "lr": "learning-rate",
    "max-length": "window",
    "model": "from",
    "output": "out",
    "override": "config",
    "seq-length": "block-length",
    "set": "config",
    "setting": "config",
    "skip": "ignore",
    "tokens": "window",
}


class _Help:
    """Help in the conventional form: flags have no type, and arguments no braces or lists."""

    def get_params(self, ctx: Any) -> list[Any]:
        found: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in found:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
            elif parameter.display_type(ctx) == "<list[Path]>":  # of a repeatable argument
                parameter.display_type = lambda _ctx: "<path>"
        return found

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        pieces = super().collect_usage_pieces(ctx)  # type: ignore[misc]
        return [piece.replace("{", "").replace("}", "") for piece in pieces]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from typer import rich_utils

        # With typer's padding on both sides, long options are cut off in terminals of 80 columns.
        rich_utils.STYLE_OPTIONS_TABLE_PADDING = (0, 1, 0, 0)  # type: ignore[assignment]
        super().format_help(ctx, formatter)  # type: ignore[misc]


class Group(_Help, TyperGroup):
    """A command with subcommands."""


class Command(_Help, TyperCommand):
    """A command that runs the user's extension files first; `--help` does not run them.

    Errors of the library name parameters; the errors of a command name its options instead, such as
    `--save-every` for `save_every`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            raise UserError(_bad_parameter(error, ctx)) from error
        except typer.TyperException as error:
            name = getattr(error, "option_name", None)
            known = [option for parameter in self.params for option in parameter.opts]
            if name is None and "unexpected extra argument" in error.message:
                hint = "put a value that contains spaces in quotes"
                raise UserError(f"{error.message}; {hint}") from error
            if name is None or name in known:
                raise
            options = [option[2:] for option in known if option.startswith("--")]
            near = " or ".join(f"'--{each}'" for each in nearest(name[2:], options, _SYNONYMS))
            hint = f"did you mean {near}?" if near else "--help lists all"
            raise UserError(f"{name}: no such option; {hint}") from error

    def invoke(self, ctx: Any) -> Any:
        load_extensions(ctx.obj or ())
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise UserError(self._with_options(str(error))) from error
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            has_option = any(parameter.name == "device" for parameter in self.params)
            remedy = "run it with --device cpu" if has_option else "use a smaller model"
            raise UserError(
                f"the memory of the GPU is full; {remedy} ({one_line(error)})"
            ) from error

    def _with_options(self, message: str) -> str:
        """Replace the parameter at the start, and others that contain an underscore."""
        options = {
            parameter.name: parameter.opts[-1]
            for parameter in self.params
            if parameter.name and parameter.opts[-1].startswith("--")
        }
        parts_of = self._parts()
        start = re.match(r"[\w.]*", message)
        assert start is not None
        name, rest = start[0], message[start.end() :]
        part_of = parts_of.get(name.partition(".")[0])
        if part_of is not None and name not in options and rest.startswith(":"):
            name = part_of if name == "options" else f"{part_of} {name}"
        elif name in options and rest.startswith((":", "[", " (")):  # `rate['router']: ...`
            name = options[name]
        compound = [each for each in options if "_" in each]
        if compound:
            pattern = re.compile(rf"\b({'|'.join(compound)})\b")
            parts = _QUOTED.split(rest)
            # Odd parts are quoted values, which stay as the user gave them.
            parts[::2] = [pattern.sub(lambda m: options[m[1]], part) for part in parts[::2]]
            rest = "".join(parts)
        return name + rest

    def _parts(self) -> dict[str, str]:
        """The names in the values of options of the form NAME=VALUE, and their options.

        `options` is the argument of `Scheme.with_options`.
        """
        from oasis_attn.modeling.settings import SETTINGS
        from oasis_attn.quantization.schemes import Scheme

        known = {
            "scheme_option": ("options", *(field.name for field in fields(Scheme))),
            "settings": SETTINGS,
        }
        return {
            name: parameter.opts[-1]
            for parameter in self.params
            for name in known.get(parameter.name or "", ())
        }


def _bad_parameter(error: typer.BadParameter, ctx: Any) -> str:
    """What is wrong with a value that cannot be parsed, or with one that is missing."""
    parameter: Any = error.param
    if parameter is None:
        return error.format_message()
    name = parameter.opts[-1] if parameter.opts[-1].startswith("--") else parameter.metavar
    parsed: Any = error.__cause__
    if parsed is None:
        reason = error.message or f"it is missing; see {ctx.command_path} --help"
        return f"{name}: {reason}"
    wanted = "a number" if parameter.bare_type() == "float" else "a whole number"
    return f"{name}: {shown(parsed.errors()[0]['input'])} is not {wanted}"
