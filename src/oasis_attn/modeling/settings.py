"""Names and values of the settings of `OasisConfig`.  This module does not import torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from oasis_attn.errors import (
    UserError,
    check_at_least,
    check_choice,
    check_whole,
)
from oasis_attn.extension_files import loaded_extensions
from oasis_attn.modeling.null_logit import context_form
from oasis_attn.registry import check_registered

SETTINGS = (
    "token_normalizer",
    "null_logit",
    "output_gate",
    "residual",
    "depth_block_size",
    "depth_normalizer",
    "mix_scale",
    "branch_norm",
    "null_signal",
    "beta_init",
)
_CHOICES = {
    "output_gate": ("none", "head", "elementwise"),
    "residual": ("sum", "depth", "official"),
    "depth_normalizer": ("softmax", "softmax1", "sigmoid"),
    "mix_scale": ("none", "sum", "rms"),
}
"""The settings whose values are a fixed set of names."""
OWN_NAMES = {
    "token_normalizer": (
        "softmax",
        "softmax1",
        "learned_sink",
        "value_null",
        "key_null",
        "key_value_null",
        "clipped_softmax",
        "softpick",
        "sparsemax",
        "entmax15",
    ),
    "branch_norm": ("none", "rms", "rms_mlp"),
    "null_signal": ("off", "on", "shuffled", "averaged"),
}
"""The settings to which users can add names, and the names of the library."""
_LARGEST = 1e6  # of numbers that are set


def check_names(settings: Mapping[str, Any]) -> None:
    """As `check_settings`, and refuse names that are not the library's, unless users can add some.

    For the command line, where only extension files add names.
    """
    check_settings(settings)
    if not loaded_extensions():
        for name, own in OWN_NAMES.items():
            if isinstance(value := settings.get(name), str):
                check_registered(name, value, own)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise `UserError` for the first unknown setting, or else for the first unknown value.

    Names that users can add, and settings that exclude each other, are checked by `OasisConfig`.
    """
    refuse_unknown(name for name in settings if name not in SETTINGS)
    for name, allowed in _CHOICES.items():
        if name in settings:
            check_choice(name, settings[name], allowed)
    if "depth_block_size" in settings:
        check_whole("depth_block_size", settings["depth_block_size"], 1)
    if "beta_init" in settings:
        check_at_least("beta_init", settings["beta_init"], -_LARGEST, _LARGEST)
    if isinstance(settings.get("null_logit"), str | dict):
        context_form(settings["null_logit"])


def refuse_unknown(names: Iterable[str]) -> None:
    """Raise `UserError` for the first of `names`, and suggest the most similar setting."""
    for name in map(str, names):
        near = difflib.get_close_matches(name, SETTINGS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"settings: {name!r} is not one of {', '.join(SETTINGS)}{hint}")
