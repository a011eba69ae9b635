"""What can be tried if a quantization scheme breaks a model.  This module does not import torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from oasis_attn.errors import UserError
from oasis_attn.quantization.schemes import Scheme, schemes

Options = Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """One change of a scheme, of the model, or of both.

    Attributes:
        name: the name in records.
        options: for a scheme, the options (`Scheme.with_options`) that the remedy changes; None if
            it does not apply to this scheme.
        prefix: whether the model gets a prefix.
        effort: time of the try, in units of the time of a pass over the windows to measure on.
    """

    name: str
    options: Callable[[Scheme], Options]
    prefix: bool = False
    effort: float

    def applies_to(self, scheme: Scheme) -> bool:
        """Whether the remedy would change something, or is refused by `apply_to`."""
        try:
            return self.apply_to(scheme) is not None
        except UserError:
            return True

    def apply_to(self, scheme: Scheme) -> Scheme | None:
        """The changed scheme; None if the remedy does not apply or would change nothing.

        Raises:
            UserError: the remedy excludes another part of the scheme.
        """
        options = self.options(scheme)
        if options is None:
            return None
        changed = scheme.with_options(options)
        return changed if self.prefix or changed != scheme else None


def _dynamic(scheme: Scheme) -> Options:
    if not scheme.static or scheme.activation is None:
        return None
    if scheme.activation.granularity == "group":
        return {"static": False}
    return {"static": False, "activation.granularity": "token"}


def _folded(scheme: Scheme) -> Options:
    """It helps activations only: with 8 bits and dynamic ranges, they need no help.

    With few bits for the weights alone, it does harm, as with scales per group.
    """
    activation = scheme.activation
    if activation is None or scheme.group_size or scheme.rotation != "none":
        return None
    return {"rotation": "folded"} if scheme.static or activation.bits < 8 else None


def _rotation(scheme: Scheme) -> Options:
    return {"rotation": "groups" if scheme.group_size else "hadamard"}


def _prefix(scheme: Scheme) -> Options:
    if scheme.activation is None:
        return None
    # Percentiles cut off the largest values.  With a prefix, a sink does not need them.
    return {"observer": "percentile"} if scheme.static and scheme.observer == "minmax" else {}


REMEDIES = (
    Remedy(name="dynamic", options=_dynamic, effort=1),
    Remedy(name="folded", options=_folded, effort=2),  # before what costs time in each run
    Remedy(name="rotation", options=_rotation, effort=2),
    Remedy(name="smoothquant", options=lambda _: {"smooth_alpha": 0.8}, effort=2.5),
    Remedy(name="prefix", options=_prefix, prefix=True, effort=6),
    Remedy(name="gptq", options=lambda _: {"rounding": "gptq"}, effort=5),
)
"""The remedies, the fastest ones first."""


def per_channel(scheme: Scheme) -> Scheme:
    """The scheme with one scale per output channel in place of one per weight.

    It is more accurate, and no slower: the kernels multiply by as many scales either way.
    """
    if scheme.weight.granularity != "tensor":
        return scheme
    return scheme.with_options({"weight.granularity": "channel"})


def combine(remedies: Sequence[Remedy], scheme: Scheme) -> Remedy | None:
    """All of `remedies` as one, the first ones first; without those that earlier ones exclude.

    Of two that change the same option, such as two rotations, the first one is kept.  None if fewer
    than two are left.
    """
    parts: list[Remedy] = []
    changed = scheme
    for remedy in remedies:
        try:
            found = remedy.apply_to(changed)
        except UserError:
            continue
        if found is None:
            continue
        if options_from(scheme, changed).keys().isdisjoint(options_from(changed, found)):
            parts.append(remedy)
            changed = found
    if len(parts) < 2:
        return None
    return Remedy(
        name="+".join(part.name for part in parts),
        options=lambda _: options_from(scheme, changed),
        prefix=any(part.prefix for part in parts),
        effort=sum(part.effort for part in parts),
    )


def shortest_name(scheme: Scheme) -> tuple[str, dict[str, Any]]:
    """A named scheme and the fewest options that turn it into `scheme`."""
    found = [
        (name, options_from(named, scheme))
        for name, named in schemes().items()
        if (named.activation is None) == (scheme.activation is None)
    ]
    return min(found, key=lambda each: (len(each[1]), each[0] != scheme.name))


def described(scheme: Scheme) -> str:
    """The name of `scheme` and its changed options, such as `w4a4, rotation=hadamard`."""
    named = schemes().get(scheme.name, scheme)
    old = _flat(named)
    changed = {name: value for name, value in _flat(scheme).items() if old.get(name) != value}
    if named.activation is not None and scheme.activation is None:
        changed["activation"] = None
    options = (f"{name}={option_text(value)}" for name, value in changed.items())
    return ", ".join((scheme.name, *options))


def option_text(value: object) -> str:
    """The value of an option as on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def options_from(before: Scheme, after: Scheme) -> dict[str, Any]:
    """The options that turn one scheme into another, which quantizes activations if it does."""
    old, new = _flat(before), _flat(after)
    return {name: value for name, value in new.items() if old[name] != value}


def _flat(scheme: Scheme) -> dict[str, Any]:
    fields = replace(scheme, name="").to_dict()
    del fields["name"]
    for part in ("weight", "activation"):
        inner = fields.pop(part) or {}
        fields |= {f"{part}.{name}": value for name, value in inner.items()}
    return fields
