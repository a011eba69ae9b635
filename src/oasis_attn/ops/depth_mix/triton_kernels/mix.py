"""One router's mix without gradients, in one pass: see `triton_mix.py`.

Axes: N tokens, D width, S sources.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oasis_attn.ops.depth_mix.routers import RMS_EPS, Routers
from oasis_attn.ops.depth_mix.triton_kernels.sums import on_device_of, power_of_2, warps


def mix(
    branch: Tensor,
    psi: Tensor | None,
    memory: tuple[Tensor, Tensor, Tensor | None],
    query_D: Tensor,
    beta: Tensor | None,
    *,
    source: int,
    members: int,
    routers: Routers,
) -> Tensor:
    """Add `branch` `[..., D]` and its psi `[...]` to a source, and mix the sources so far.

    Args:
        branch: the first member of `source`, or added to the earlier members.
        psi: its null evidence; None for 0.
        memory: the sources `[S, ..., D]`, their inverse RMS `[S, ...]` and the sum of their
            members' psi `[S, ...]`, None without the null signal.  Updated in place.
        query_D: of the router.
        beta: of the router, the first element; None without the null signal.
        source: the index of the source.
        members: how many it has, this one included.
        routers: for what all routers share.
    """
    sources, inverse_rms, evidence = memory
    branch, psi = branch.contiguous(), None if psi is None else psi.contiguous()
    mixed = torch.empty_like(sources[0])
    N, D = inverse_rms[0].numel(), mixed.shape[-1]
    block = power_of_2(D)
    with on_device_of(mixed):
        _mix_kernel[(N,)](
            *(branch, psi, sources, inverse_rms, evidence, query_D, beta, mixed),
            *(N, D, source, members, routers.block_size, routers.eps, RMS_EPS),
            routers.scale(source + 1),
            *(routers.normalizer == "softmax1", routers.mix_scale == "rms", block),
            num_warps=warps(block),
        )
    return mixed


@triton.jit(do_not_specialize=["N", "source", "members", "size", "scale"])
def _mix_kernel(
    branch, psi, sources, inverse_rms, evidence, query, beta, mixed,
    N, D, source, members, size, eps, unit_eps, scale,
    WITH_NULL: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    N = N.to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    wide = query.dtype.element_ty
    direction = tl.load(query + columns, mask=inside, other=0.0)

    # The newest source, with the branch as its newest member.
    at = (source * N + row) * D + columns
    value = tl.load(branch + row * D + columns, mask=inside, other=0.0).to(wide)
    if members > 1:
        value += tl.load(sources + at, mask=inside, other=0.0).to(wide)
    kept = value.to(sources.dtype.element_ty)
    tl.store(sources + at, kept, mask=inside)
    value = kept.to(wide)
    inverse = 1 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    tl.store(inverse_rms + source * N + row, inverse)
    largest = tl.sum(value * direction, 0) * inverse
    strength = tl.zeros_like(largest)
    psi_sum = tl.zeros_like(largest)
    if evidence is not None:
        strength += tl.load(beta)
        if psi is not None:
            psi_sum += tl.load(psi + row).to(wide)
        if members > 1:
            psi_sum += tl.load(evidence + source * N + row)
        tl.store(evidence + source * N + row, psi_sum)
        psi_sum = psi_sum / members
        largest -= strength * psi_sum

    # The softmax over it and the earlier ones, as they come.  psi is not centered here: for
    # Softmax1 that moves the null's logit from 0, and for the softmax it changes nothing.
    total = tl.zeros_like(largest) + 1
    sum = value
    for i in range(source):
        value = tl.load(sources + (i * N + row) * D + columns, mask=inside, other=0.0).to(wide)
        logit = tl.sum(value * direction, 0) * tl.load(inverse_rms + i * N + row)
        if evidence is not None:
            known = tl.load(evidence + i * N + row)
            if i > 0:  # the embedding has no members
                known = known / size
            psi_sum += known
            logit -= strength * known
        larger = tl.maximum(largest, logit)
        old, new = tl.exp(largest - larger), tl.exp(logit - larger)
        sum = sum * old + value * new
        total = total * old + new
        largest = larger
    if WITH_NULL:
        null = -strength * psi_sum / (source + 1)
        larger = tl.maximum(largest, null)
        old = tl.exp(largest - larger)
        sum = sum * old
        total = total * old + tl.exp(null - larger)
    result = sum * (scale / total)
    if UNIT:
        result = result / tl.sqrt(tl.sum(result * result, 0) / D + unit_eps)
    tl.store(mixed + row * D + columns, result.to(mixed.dtype.element_ty), mask=inside)
