"""The weighted sum of the sources, and its gradients; `fits` says what can be read.

Axes: N tokens, D width, S sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 16384  # of a source: a program holds a token
DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def fits(sources: Sequence[Tensor]) -> bool:
    """Whether the kernels can read the sources, which must have one shape.

    They must be contiguous, aligned and of one floating-point dtype; the first may differ from the
    others in dtype, as an embedding does under autocast.
    """
    first, last = sources[0], sources[-1]
    if first.dtype not in DTYPES or last.dtype not in DTYPES or first.shape[-1] > MAX_WIDTH:
        return False
    return _readable(first, first.dtype) and all(_readable(x, last.dtype) for x in sources[1:])


def can_add(onto: Sequence[Tensor | None], sources: Sequence[Tensor]) -> bool:
    """Whether `sum_gradients` can add to `onto`, where it is given."""
    pairs = zip(onto, sources, strict=True)
    return all(old is None or _readable(old, source.dtype) for old, source in pairs)


def _readable(tensor: Tensor, dtype: torch.dtype) -> bool:
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # inside vmap, or a transform of torch.func
        return False
    aligned = address != 0 and address % 16 == 0  # 0: empty, or without data
    return aligned and tensor.dtype == dtype and tensor.is_contiguous()


def weighted_sum(sources: Sequence[Tensor], weights: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_i weights_i sources_i, `[..., D]` in `dtype`, from weights `[..., S]`."""
    mixed = torch.empty_like(sources[0], dtype=dtype)
    weights_NS, D = _rows(weights), mixed.shape[-1]
    block = power_of_2(D)
    table = _table([source.data_ptr() for source in sources], mixed)
    with on_device_of(mixed):
        _sum_kernel[(len(weights_NS),)](
            *(table, weights_NS, mixed, weights_NS.stride(0), len(sources), D),
            *(DTYPES[sources[0].dtype], DTYPES[sources[-1].dtype], block),
            num_warps=warps(block),
        )
    return mixed


def sum_gradients(
    sources: Sequence[Tensor],
    grad: Tensor,
    weights: Tensor | None,
    onto: Sequence[Tensor | None],
    into: Sequence[Tensor | None],
    products: bool = True,
) -> Tensor | None:
    """The gradients of `weighted_sum`, from that of its result, `[..., D]`.

    Writes `onto_i + weights_i grad` to `into_i`, which may be `onto_i`, where that is given;
    without weights, nothing.  Returns `<source_i, grad>`, `[..., S]` in the dtype of the weights
    (else of `grad`), if `products`.
    """
    grad, S, D = grad.contiguous(), len(sources), grad.shape[-1]
    found = grad.new_empty(*grad.shape[:-1], S, dtype=None if weights is None else weights.dtype)
    weights_NS = _rows(found if weights is None else weights)
    block = power_of_2(D)
    addresses = [source.data_ptr() for source in sources]
    if weights is not None:
        addresses += [0 if x is None else x.data_ptr() for x in (*onto, *into)]
    with on_device_of(grad):
        _gradients_kernel[(len(weights_NS),)](
            *(_table(addresses, grad), weights_NS, grad, found, weights_NS.stride(0), S, D),
            *(DTYPES[sources[0].dtype], DTYPES[sources[-1].dtype], products, weights is not None),
            *(block,),
            num_warps=warps(block),
        )
    return found if products else None


def power_of_2(size: int) -> int:
    """The next one; Triton's own takes as long as a launch."""
    return 1 << (size - 1).bit_length()


def tiles(size: int, tile: int) -> int:
    """ceil(size / tile)"""
    return -(-size // tile)


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def warps(block: int) -> int:
    return min(16, max(1, block // 512))


def _rows(weights: Tensor) -> Tensor:
    """`[N, S]` with neighboring columns, without a copy if it can be."""
    rows = weights.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _table(addresses: list[int], like: Tensor) -> Tensor:
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    return _copied(tuple(addresses), like.device, stream)


@lru_cache(maxsize=2048)
def _copied(addresses: tuple[int, ...], device: torch.device, _stream: int) -> Tensor:
    """On the device; the same tensors tend to come back in the next step."""
    table = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


# -------------------------------------------------------------------------------------- kernels


@triton.jit
def _at(table, index, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(table + index).to(tl.pointer_type(dtype)), 16)


@triton.jit(do_not_specialize=["stride", "S"])
def _sum_kernel(
    table,
    weights,
    mixed,
    stride,
    S,
    D,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    wide = weights.dtype.element_ty
    value = tl.load(_at(table, 0, FIRST) + row * D + columns, mask=inside, other=0.0).to(wide)
    total = value * tl.load(weights + row * stride)
    for i in range(1, S):
        value = tl.load(_at(table, i, REST) + row * D + columns, mask=inside, other=0.0).to(wide)
        total += value * tl.load(weights + row * stride + i)
    tl.store(mixed + row * D + columns, total.to(mixed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["stride", "S"])
def _gradients_kernel(
    table, weights, grad, products, stride, S, D,
    FIRST: tl.constexpr, REST: tl.constexpr, PRODUCTS: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    wide = weights.dtype.element_ty
    upstream = tl.load(grad + row * D + columns, mask=columns < D, other=0.0).to(wide)
    weights += row * stride
    products += row * S
    _one_gradient(
        table, weights, products, upstream, 0, S, row * D, D, FIRST, PRODUCTS, SCALED, BLOCK
    )
    for i in range(1, S):
        _one_gradient(
            table, weights, products, upstream, i, S, row * D, D, REST, PRODUCTS, SCALED, BLOCK
        )


@triton.jit
def _one_gradient(
    table, weights, products, upstream, i, S, start, D,
    DTYPE: tl.constexpr, PRODUCTS: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    if PRODUCTS:
        value = tl.load(_at(table, i, DTYPE) + start + columns, mask=inside, other=0.0)
        tl.store(products + i, tl.sum(value.to(upstream.dtype) * upstream, 0))
    if SCALED:
        into = _at(table, 2 * S + i, DTYPE)
        if into.to(tl.int64) != 0:
            result = upstream * tl.load(weights + i)
            onto = _at(table, S + i, DTYPE)
            if onto.to(tl.int64) != 0:
                result += tl.load(onto + start + columns, mask=inside, other=0.0).to(result.dtype)
            tl.store(into + start + columns, result.to(DTYPE), mask=inside)
