"""Which parameters a run trains, and the groups with their own learning rates."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from oasis_attn.errors import UserError, check_at_least, check_choice, shown

if TYPE_CHECKING:
    from torch import nn

_NAMES = {
    "beta": r"(^|\.)((oasis_)?beta_raw$|null_signal\.)",
    "router": r"(^|\.)(depth|attn_res_sa|attn_res_mlp)\.",
    "null": r"(^|\.)(null_logit|null_key|null_value|sinks)$",
    "lora": r"\.lora_[AB]\.",
}
GROUPS = ("backbone", *_NAMES)
"""Parameter groups that can have their own learning rate.

`router`: depth queries and key norms.  `beta`: beta of the null signal, and the parameters of its
module.  `null`: logits, keys and values of nulls.  `lora`: adapters.  `backbone`: all others.
"""


def group_of(name: str) -> str:
    """The group of `GROUPS` that the parameter `name` belongs to."""
    found = (group for group, pattern in _NAMES.items() if re.search(pattern, name))
    return next(found, "backbone")


def check_patterns(trainable: object) -> None:
    """Raise `UserError` unless `trainable` can be the patterns of `train_only`."""
    if isinstance(trainable, str) or not (
        isinstance(trainable, Sequence) and all(isinstance(name, str) for name in trainable)
    ):
        raise UserError(f"trainable: {shown(trainable)} is not a list of patterns")


def check_learning_rates(rates: object, largest: float = math.inf) -> None:
    """Raise `UserError` unless `rates` is a mapping from groups to learning rates."""
    if not isinstance(rates, Mapping):
        raise UserError(
            f"learning_rates: {shown(rates)} is not a mapping from groups to learning rates"
        )
    if None in rates:
        raise UserError('learning_rates: None is not a group; in YAML, quote the group: "null"')
    for group, rate in rates.items():
        check_choice("learning_rates", group, GROUPS)
        check_at_least(f"learning_rates[{group!r}]", rate, 0, largest)


def check_groups_trained(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Raise `UserError` if no parameter of a group in `rates` is trained."""
    groups = sorted({group_of(name) for name, _ in trained(model)})
    for group in rates:
        if group not in groups:
            raise UserError(
                f"learning_rates: no parameter of the group {group!r} is trained; the trained"
                f" groups are {', '.join(groups)}"
            )


def train_only(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze all parameters except those of LoRA and those whose name matches one of `patterns`.

    Args:
        model: the model to change.
        patterns: shell patterns (`model.layers.2?.mlp.*`) or names in `GROUPS`.  If empty, all
            parameters are trained, or, if `model` has LoRA adapters, all except the backbone.

    Raises:
        UserError: a pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    adapted = any(group_of(name) == "lora" for name in names)
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise UserError(
                f"trainable: {pattern!r} matches no parameter (for example {names[-1]!r}) and is"
                f" not one of the groups {', '.join(sorted(set(map(group_of, names))))}"
            )
    for name, parameter in model.named_parameters():
        if patterns:
            chosen = any(_matches(name, pattern) for pattern in patterns)
        else:
            chosen = not adapted or group_of(name) != "backbone"
        parameter.requires_grad_(chosen or group_of(name) == "lora")


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The names and values of the parameters that are trained."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _matches(name: str, pattern: str) -> bool:
    return group_of(name) == pattern or fnmatchcase(name, pattern)
