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


def keep_rotary_frequencies(model: nn.Module) -> None:
    """Let casts of `model` leave its rotary frequencies in float32, as loading it does."""
    for module in model.modules():
        names = [name for name, _ in module.named_buffers(recurse=False) if "inv_freq" in name]
        if names:
            vars(module)["_apply"] = partial(apply_keeping, module, names)
