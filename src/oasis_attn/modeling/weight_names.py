"""The names of the parameters that we add, and a family's conversions, which must not touch them.

transformers converts weights by patterns when it loads and saves (experts are single matrices on
disk and stacked in memory).  A pattern matches anywhere in a name: mixtral's `.mlp.`, a regular
expression, matches `attn_res_mlp.` too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

_OURS = frozenset(
    {
        "depth",
        "null_logit",
        "null_signal",
        "output_gate",
        "attn_res_sa",
        "attn_res_mlp",
        "kv_prefix",
    }
)


def is_ours(name: str) -> bool:
    """Whether a tensor of a model of ours is one that its family does not have."""
    return not _OURS.isdisjoint(name.split("."))


def register_conversions(routed: str, native: type, model_type: str) -> None:
    """Let the class named `routed` load and save the family's weights as `native` does."""
    for key in (native.__name__, model_type):  # as transformers looks them up
        conversions = get_checkpoint_conversion_mapping(key)
        if conversions is not None:
            for conversion in conversions:
                conversion.__class__ = _sparing(type(conversion))  # type: ignore[arg-type]
            register_checkpoint_conversion_mapping(routed, conversions, overwrite=True)
            return


class _Sparing:
    """Mixed into a kind of conversion: it leaves the parameters that we add alone."""

    __slots__ = ()
    native: type

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if is_ours(source_key):
            return source_key, None
        renamed: tuple[str, str | None] = super().rename_source_key(source_key)  # type: ignore[misc]
        return renamed

    def reverse_transform(self) -> Any:
        reverse = super().reverse_transform()  # type: ignore[misc]
        reverse.__class__ = _sparing(self.native)
        return reverse

    def __reduce__(self) -> tuple[Any, ...]:  # the class is made on demand, by unpickling too
        return _unpickled, (self.native,), self.__getstate__()


@cache
def _sparing(native: type) -> Any:
    body = {"native": native, "__slots__": ()}
    return type(f"Sparing{native.__name__}", (_Sparing, native), body)


def _unpickled(native: type) -> Any:
    kind = _sparing(native)
    return kind.__new__(kind)
