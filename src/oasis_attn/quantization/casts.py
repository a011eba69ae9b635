"""Buffers whose dtype does not change when a model is cast."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from oasis_attn.ops.torch_compat import apply_to_tensors, replace_apply


class FixedPrecisionModule(nn.Module):
    """A module whose `fixed_buffers` hold quantization parameters; casts keep their dtype."""

    fixed_buffers: ClassVar[tuple[str, ...]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return apply_keeping_dtype(self, self.fixed_buffers, fn, recurse)


def apply_keeping_dtype(
    module: nn.Module,
    names: Iterable[str],
    function: Callable[[Tensor], Tensor],
    recurse: bool = True,
) -> nn.Module:
    """`nn.Module._apply`, which casts and moves a module, but the buffers `names` keep their dtype.

    They are moved to the new device.
    """
    before = {name: getattr(module, name) for name in names}
    apply_to_tensors(module, function, recurse)
    for name, buffer in before.items():
        moved: Tensor = getattr(module, name)
        if moved.dtype != buffer.dtype:
            setattr(module, name, buffer.to(moved.device))
    return module


def guard_computed_buffers(model: nn.Module) -> None:
    """Make casts of `model` treat buffers that are not saved as loading treats them.

    Loading computes these buffers again.  Rotary frequencies therefore keep their dtype in a cast.
    A cast of any other such buffer is recorded, see `changed_by_cast`.
    """
    stored = model.state_dict().keys()
    for path, module in model.named_modules():
        computed = {
            name
            for name, buffer in module.named_buffers(path, recurse=False)
            if buffer.is_floating_point() and name not in stored
        }
        names = {name.removeprefix(f"{path}.") for name in computed}
        if names and not path.endswith("kv_prefix"):  # `prefix_storage` saves the prefix
            rotary = {name for name in names if "inv_freq" in name}
            replace_apply(module, partial(_apply_recording, module, rotary, names - rotary))


def changed_by_cast(module: nn.Module) -> str | None:
    """The name of an unsaved buffer of `module` whose dtype a cast changed; None without one."""
    return getattr(module, "_changed_by_cast", None)


def _apply_recording(
    module: nn.Module,
    fixed: set[str],
    recorded: set[str],
    function: Callable[[Tensor], Tensor],
    recurse: bool = True,
) -> nn.Module:
    before = {name: getattr(module, name).dtype for name in recorded}
    apply_keeping_dtype(module, fixed, function, recurse)
    for name, dtype in before.items():
        if getattr(module, name).dtype != dtype:
            vars(module)["_changed_by_cast"] = name
    return module
