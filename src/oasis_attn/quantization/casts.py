"""What a cast of a model leaves in its own precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import ClassVar

from torch import Tensor, nn


class KeepsPrecision(nn.Module):
    """Its buffers `kept` define the grid of what is quantised; no cast changes their dtype."""

    kept: ClassVar[tuple[str, ...]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return apply_keeping(self, self.kept, fn, recurse)


def apply_keeping(
    module: nn.Module,
    names: Iterable[str],
    function: Callable[[Tensor], Tensor],
    recurse: bool = True,
) -> nn.Module:
    """`nn.Module._apply`, which casts and moves, but the buffers `names` keep their dtype."""
    before = {name: getattr(module, name) for name in names}
    nn.Module._apply(module, function, recurse)
    for name, buffer in before.items():
        moved: Tensor = getattr(module, name)
        if moved.dtype != buffer.dtype:
            setattr(module, name, buffer.to(moved.device))
    return module


def guard_computed_buffers(model: nn.Module) -> None:
    """Let casts of `model` leave the buffers that loading computes anew as loading makes them.

    Rotary frequencies keep their precision.  Casts of others are noted: see `changed_by_cast`.
    """
    stored = model.state_dict().keys()
    for path, module in model.named_modules():
        computed = {
            name
            for name, buffer in module.named_buffers(path, recurse=False)
            if buffer.is_floating_point() and name not in stored
        }
        names = {name.removeprefix(f"{path}.") for name in computed}
        if names and not path.endswith("kv_prefix"):  # which is stored, see `hf_quantizer`
            rotary = {name for name in names if "inv_freq" in name}
            vars(module)["_apply"] = partial(_apply_noting, module, rotary, names - rotary)


def changed_by_cast(module: nn.Module) -> str | None:
    """The name of a buffer of `module` that loading would compute anew and that a cast changed."""
    return getattr(module, "_changed_by_cast", None)


def _apply_noting(
    module: nn.Module,
    kept: set[str],
    noted: set[str],
    function: Callable[[Tensor], Tensor],
    recurse: bool = True,
) -> nn.Module:
    before = {name: getattr(module, name).dtype for name in noted}
    apply_keeping(module, kept, function, recurse)
    for name, dtype in before.items():
        if getattr(module, name).dtype != dtype:
            vars(module)["_changed_by_cast"] = name
    return module
