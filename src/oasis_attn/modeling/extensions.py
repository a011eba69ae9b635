"""Null signals and branch norms: settings of `OasisConfig` to which users can add a function.

    def largest_head(null_BHT, layer):
        return null_BHT.amax(1)

    register_null_signal("largest_head", largest_head)
    OasisConfig(null_signal="largest_head")

A checkpoint contains only the name, which must be registered before the checkpoint is loaded.
docs/extending.md explains how, on the command line and in studies.

Axes: B batch, H heads, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oasis_attn.errors import UserError
from oasis_attn.registry import Registry

if TYPE_CHECKING:
    from oasis_attn.modeling.configuration_oasis import OasisConfig

NullSignal = Callable[[Tensor, int], Tensor | tuple[Tensor | None, Tensor | None] | None]
BranchNorm = Callable[[Tensor, str], Tensor]


def mean_over_heads(null_BHT: Tensor, layer: int) -> Tensor:  # noqa: ARG001
    """psi of OASIS (section 3): the mean over heads, for the attention and the MLP of a layer."""
    return null_BHT.mean(1)


def shuffled(null_BHT: Tensor, layer: int) -> Tensor:  # noqa: ARG001
    """psi of OASIS, permuted over all tokens of the batch: a control without the information.

    Each layer draws one random permutation, so that its attention and its MLP have the same psi.
    The result uses values of future tokens.
    """
    psi_BT = null_BHT.mean(1)
    order = torch.randperm(psi_BT.numel(), device=psi_BT.device)
    return psi_BT.flatten()[order].view_as(psi_BT)


def averaged(null_BHT: Tensor, layer: int) -> Tensor:  # noqa: ARG001
    """psi of OASIS, averaged over all tokens of the batch: a control without the information.

    A constant psi for all sources would do nothing, because psi is centered over them.  This keeps
    the mean of each source, so that the signal can still prefer one source to another, but not at
    some tokens more than at others.  The result uses values of future tokens.
    """
    psi_BT = null_BHT.mean(1)
    return psi_BT.mean().expand_as(psi_BT)


def rms(x_BTD: Tensor, kind: str) -> Tensor:  # noqa: ARG001
    """Root mean square 1 at each token: Peri-LN (arXiv 2502.02732) without its gain."""
    # The eps of most families; a smaller one allows larger gradients.
    return F.rms_norm(x_BTD, x_BTD.shape[-1:], eps=1e-6)


def rms_mlp(x_BTD: Tensor, kind: str) -> Tensor:
    """`rms` for MLPs only, so that the null can still make attention outputs small."""
    return rms(x_BTD, kind) if kind == "mlp" else x_BTD


NULL_SIGNALS = Registry(
    "null_signal", {"on": mean_over_heads, "shuffled": shuffled, "averaged": averaged}
)
BRANCH_NORMS = Registry("branch_norm", {"rms": rms, "rms_mlp": rms_mlp})


def register_null_signal(name: str, signal: NullSignal | type[nn.Module]) -> None:
    """Add `name` to the values of `OasisConfig.null_signal`.

    Args:
        name: letters, digits and `_`; not a name of the library.
        signal: a function that each layer calls with its null probabilities `[B, H, T]` and its
            index.  It returns psi `[B, T]` for attention and MLP, or a tuple of one for each; None
            stands for 0.  Or a subclass of `nn.Module` with such a `forward`: a model constructs it
            from its `OasisConfig` and saves its parameters as `model.null_signal.*`.  All its
            tensors must be parameters or buffers.  `from_pretrained` keeps them in float32; after
            `model.to(dtype)`, null probabilities and psi have this dtype, too.

    Raises:
        UserError: `name` is not valid or is a name of the library, or `signal` is not callable.
    """
    if isinstance(signal, nn.Module):
        raise UserError(
            f"null_signal: {type(signal).__name__} is an object; register its class, so that each"
            " model has parameters of its own"
        )
    NULL_SIGNALS.register(name, signal)


def register_branch_norm(name: str, norm: BranchNorm) -> None:
    """Add `name` to the values of `OasisConfig.branch_norm`.

    Args:
        name: letters, digits and `_`; not a name of the library.
        norm: a function that is called with the embedding and the output of each branch,
            `[B, T, D]`, before they are added to the residual, and with their kind, "embedding",
            "attention" or "mlp".  It returns `[B, T, D]`.

    Raises:
        UserError: as `register_null_signal`.
    """
    if isinstance(norm, type | nn.Module):
        raise UserError("branch_norm: a module or a class cannot be registered; give a function")
    BRANCH_NORMS.register(name, _checked(name, norm) if callable(norm) else norm)


def _checked(name: str, norm: BranchNorm) -> BranchNorm:
    """`norm`, with a check of the shape that it returns."""

    @wraps(norm)
    def checked(x_BTD: Tensor, kind: str) -> Tensor:
        normed: Any = norm(x_BTD, kind)
        if getattr(normed, "shape", None) != x_BTD.shape:
            raise UserError(
                f"branch_norm: for kind {kind!r}, {name!r} returned {_shape(normed)}; it must"
                f" return a tensor {list(x_BTD.shape)}"
            )
        return normed  # type: ignore[no-any-return]

    return checked


def null_signal_module(config: OasisConfig) -> nn.Module | None:
    """A new module for `config.null_signal`, at least in float32, if a module class is registered
    for it."""
    signal = None if config.null_signal == "off" else NULL_SIGNALS[config.null_signal]
    if not (isinstance(signal, type) and issubclass(signal, nn.Module)):
        return None
    default = torch.get_default_dtype()  # that of the model while transformers constructs it
    torch.set_default_dtype(torch.promote_types(default, torch.float32))
    try:
        return signal(config)
    finally:
        torch.set_default_dtype(default)


def null_evidence(
    signal: NullSignal | None, null_BHT: Tensor | None, layer: int
) -> tuple[Tensor | None, Tensor | None]:
    """psi of a layer's attention and of its MLP, each `[B, T]` or None for 0."""
    if signal is None or null_BHT is None:
        return None, None
    given_BHT = null_BHT
    if isinstance(signal, nn.Module):
        tensors = chain(signal.parameters(), signal.buffers())
        dtypes = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
        given_BHT = null_BHT.to(next(dtypes, null_BHT.dtype))
    psi = signal(given_BHT, layer)
    both = psi if isinstance(psi, tuple) else (psi, psi)
    expected = null_BHT.shape[0], null_BHT.shape[2]
    for each in both:
        if (each is not None and getattr(each, "shape", None) != expected) or len(both) != 2:
            found = ", ".join(str(_shape(part)) for part in both)
            raise UserError(
                f"null_signal: in layer {layer} it returned {found}; psi must be a tensor"
                f" {list(expected)}, None, or a tuple of two of these"
            )
    psi_BT, mlp_psi_BT = (None if each is None else each.to(null_BHT.dtype) for each in both)
    return psi_BT, psi_BT if both[1] is both[0] else mlp_psi_BT


def _shape(returned: Any) -> list[int] | str:
    """The shape of a tensor, or the type of anything else, for messages."""
    return list(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
