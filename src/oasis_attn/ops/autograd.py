"""Base of the functions with hand-written gradients.

A second derivative raises an error; `vmap` runs one call per entry.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oasis_attn.errors import UserError


class _WithoutDefaults(inspect.Signature):
    """Of a function that is called with all its arguments, by position.

    To bind them to their names, as `inspect.Signature` does, takes longer than such a call.
    """

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return _Bound(args, kwargs)


class _Bound(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        pass


class HandWritten(torch.autograd.Function):
    """Base class for autograd functions whose gradient is written by hand.

    A subclass defines `forward` without a context, and `setup_context`, so that the transforms of
    `torch.func` can run it.  Its `backward` must call `first_order`.
    """

    def __init_subclass__(cls) -> None:
        # Cache the signature: PyTorch inspects it at every call, which is slower than the call.
        super().__init_subclass__()
        signature = _WithoutDefaults(list(inspect.signature(cls.forward).parameters.values()))
        cls.forward.__signature__ = signature  # type: ignore[attr-defined]

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        """Call the function once per entry of the mapped axis; the kernels take no extra axis."""
        entries = []
        for index in range(info.batch_size):
            picked = zip(inputs, in_dims, strict=True)
            one = (x if d is None else x.select(d, index) for x, d in picked)
            entries.append(cls.apply(*one))  # type: ignore[no-untyped-call]
        if isinstance(entries[0], Tensor):
            return torch.stack(entries), 0
        outputs = [None if x[0] is None else torch.stack(x) for x in zip(*entries, strict=True)]
        return tuple(outputs), tuple(None if x is None else 0 for x in outputs)


def first_order(gradients: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """Return `gradients(*tensors)`; differentiating the result raises `UserError`.

    PyTorch's `once_differentiable` is not sufficient: if no incoming gradient requires a gradient,
    it returns constants, and a second derivative is silently wrong by a missing term.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        return _FirstOrder.apply(gradients, *tensors)  # type: ignore[no-untyped-call]
    return gradients(*tensors)


class _FirstOrder(HandWritten):
    @staticmethod
    def forward(gradients: Callable[..., Any], *tensors: Tensor | None) -> Any:
        return gradients(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # noqa: ARG004
        raise UserError(
            "second derivative: the fused kernels do not support it; use backend='naive'"
        )
