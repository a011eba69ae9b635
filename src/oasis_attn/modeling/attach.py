"""Create subclasses of a family's own classes at run time, with a mixin of this library."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from transformers import MODEL_MAPPING

from oasis_attn.modeling.hf_compat import (
    OutputRecorder,
    recorded_outputs,
    register_recorded_outputs,
)
from oasis_attn.modeling.weight_names import register_conversions


class Attached:
    """Mixin of classes that are created at run time; `origin` tells pickle how to create them."""

    origin: tuple[Callable[..., type], type, type]

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, self.origin, self.__getstate__()


def _unpickled(make: Callable[..., type], mixin: type, native: type) -> Any:
    attached: Any = make(mixin, native)
    return attached.__new__(attached)


@cache
def attached_layer(mixin: Any, native: Any) -> Any:
    """A subclass of `mixin` and of the decoder layer class `native`."""
    members = {"origin": (attached_layer, mixin, native)}
    return type(f"Routed{native.__name__}", (mixin, native), members)


@cache
def attached_model(mixin: Any, text_config_class: Any) -> Any:
    """A subclass of `mixin` and of the base model class of the family with this config class."""
    native: Any = MODEL_MAPPING[text_config_class]
    recorded = recorded_outputs(native)
    attention = recorded.pop("attentions", None)
    if attention is not None:  # our function returns the null probability instead of the map
        target = attention.target_class if isinstance(attention, OutputRecorder) else attention
        recorded["null_probability"] = OutputRecorder(target, index=1)
    name = f"Routed{native.__name__}"
    register_conversions(name, native, text_config_class.model_type)
    origin = (attached_model, mixin, text_config_class)
    attached = type(name, (mixin, native), {"origin": origin, "_can_record_outputs": recorded})
    register_recorded_outputs(attached, recorded)  # as in `__init__`, for unpickling
    return attached
