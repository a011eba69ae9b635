"""Names of the parameters that OASIS adds, and how to keep weight conversions from changing them.

transformers converts weights by name patterns when it loads and saves (experts are single matrices
on disk and one stacked tensor in memory).  A pattern matches anywhere in a name: mixtral's regular
expression `.mlp.` also matches `attn_res_mlp.`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from oasis_attn.modeling.hf_compat import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

_OURS = frozenset(
    {
        "depth",
        "null_key",
        "null_logit",
        "null_signal",
        "null_value",
        "output_gate",
        "attn_res_sa",
        "attn_res_mlp",
        "kv_prefix",
    }
)


def is_ours(name: str) -> bool:
    """Whether OASIS adds this tensor, so that the family's own model does not have it."""
    return not _OURS.isdisjoint(name.split("."))


def register_conversions(routed: str, native: type, model_type: str) -> None:
    """Register the conversions of the class `native` for the class named `routed` too."""
    for key in (native.__name__, model_type):  # the order in which transformers looks them up
        conversions = get_checkpoint_conversion_mapping(key)
        if conversions is not None:
            for conversion in conversions:
                conversion.__class__ = _skipping(type(conversion))  # type: ignore[arg-type]
            register_checkpoint_conversion_mapping(routed, conversions, overwrite=True)
            return


class _SkipsAdded:
    """Mixin for a conversion class: it does not convert the parameters that OASIS adds."""

    __slots__ = ()
    native: type

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if is_ours(source_key):
            return source_key, None
        renamed: tuple[str, str | None] = super().rename_source_key(source_key)  # type: ignore[misc]
        return renamed

    def reverse_transform(self) -> Any:
        reverse = super().reverse_transform()  # type: ignore[misc]
        reverse.__class__ = _skipping(self.native)
        return reverse

    def __reduce__(self) -> tuple[Any, ...]:  # unpickling must create the class first
        return _new_skipping, (self.native,), self.__getstate__()


@cache
def _skipping(native: type) -> Any:
    """A subclass of the conversion class `native` that does not convert added parameters."""
    body = {"native": native, "__slots__": ()}
    return type(f"{native.__name__}SkipsAdded", (_SkipsAdded, native), body)


def _new_skipping(native: type) -> Any:
    subclass = _skipping(native)
    return subclass.__new__(subclass)
