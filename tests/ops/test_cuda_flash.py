"""CudaFlash around a plain kernel on the CPU, and around PyTorch's kernels where there is CUDA."""

import math
from importlib import import_module

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from oasis_attn.ops import null_attention
from oasis_attn.ops.null_attention import null_of_call

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# The package has a function of this name, too.
module = import_module("oasis_attn.ops.null_attention.cuda_flash")


def scores_of(query, key, additive, is_causal, scale):
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.mT * scale
    if additive is not None:
        scores = scores + additive
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    return scores, key


def plain_forward(query, key, value, additive, is_causal, scale):
    """As a kernel's: where nothing may be seen, out is NaN."""
    scores, _ = scores_of(query, key, additive, is_causal, scale)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def plain_backward(grad_out, query, key, value, out, lse, additive, is_causal, scale):
    """As the kernels': `out` for delta alone, and p from whichever log-sum-exp is given."""
    scores, keys = scores_of(query, key, additive, is_causal, scale)
    groups = query.shape[1] // key.shape[1]
    p = (scores - lse.unsqueeze(-1)).exp()
    delta = (grad_out * out).sum(-1, keepdim=True)
    ds = p * (grad_out @ value.repeat_interleave(groups, 1).mT - delta) * scale
    grads = [x.unflatten(1, (-1, groups)).sum(2) for x in (ds.mT @ query, p.mT @ grad_out)]
    return ds @ keys, *grads


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(module, "_forward", plain_forward)
    monkeypatch.setattr(module, "_backward", plain_backward)


def inputs(T=9, S=9, H=4, G=2, d=8, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, H, T, d), (2, G, S, d), (2, G, S, d), (H,))
    leaves = [torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes]
    leaves = [x.to(device, dtype) for x in leaves[:3]] + [leaves[3].to(device)]
    return [x.requires_grad_() for x in leaves]


def mask_of(T, S, kind, dtype, device="cpu"):
    if kind == "none":
        return None
    boolean = torch.rand(2, 1, T, S, generator=torch.Generator().manual_seed(1)) > 0.3
    boolean[0, 0, T // 2] = False  # one query that may see nothing
    if kind == "boolean":
        return boolean.to(device)
    return torch.zeros(2, 1, T, S, dtype=dtype).masked_fill(~boolean, -math.inf).to(device)


def compare(call, given, mask, is_causal, tolerance):
    """`given`: query, key, value, null logits, and perhaps the values of the null."""
    exact = [x.detach().double().requires_grad_() for x in given]
    wide = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    options = {"attn_mask": wide, "is_causal": is_causal, "null_logit": exact[3]}
    options["null_value"] = exact[4] if len(exact) > 4 else None
    expected = null_attention(*exact[:3], **options, backend="naive")
    actual = call(*given[:3], mask, is_causal, *given[3:])
    generator = torch.Generator().manual_seed(2)
    upstream = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        for x in expected
    ]
    pairs = list(zip(actual, expected, strict=True))
    for outs in ((0,), (1,), (0, 1)):
        results = [
            torch.autograd.grad(
                [side[i] for i in outs],
                leaves,
                [upstream[i].to(side[i].dtype) for i in outs],
                retain_graph=True,
                allow_unused=True,
            )
            for side, leaves in ((actual, given), (expected, exact))
        ]
        pairs += zip(*results, strict=True)
    for got, wanted in pairs:
        if wanted is None:  # of a value, by the null alone
            assert got is None or got.abs().max() < 1e-20
            continue
        assert got.isfinite().all()
        error = (got.double() - wanted).norm() / wanted.norm().clamp(min=1e-9)
        assert error <= tolerance


def by_cuda_flash(query, key, value, mask, is_causal, c, null_value=None):
    scale = query.shape[-1] ** -0.5
    null = null_of_call(query, key.shape[1], scale=scale, null_logit=c, null_value=null_value)
    return module.cuda_flash(query, key, value, null, mask, is_causal, scale)[:2]


@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
@pytest.mark.parametrize("width", [8, 5])
@pytest.mark.usefixtures("plain")
def test_values_and_gradients_around_a_plain_kernel(mask, width):
    given = inputs(d=width)
    null_value = torch.randn(4, 1, width, dtype=torch.float64).requires_grad_()
    for leaves in (given, [*given, null_value]):
        compare(by_cuda_flash, leaves, mask_of(9, 9, mask, torch.float64), mask == "none", 1e-12)


@pytest.mark.parametrize("mask", ["none", "boolean"])
@pytest.mark.usefixtures("plain")
def test_torch_compile_traces_it_whole(mask):
    torch._dynamo.reset()
    compiled = torch.compile(by_cuda_flash, backend="aot_eager", fullgraph=True)
    given = inputs(dtype=torch.float32)
    given[3] = given[3].detach().float().requires_grad_()
    given.append(torch.randn(4, 1, 8).requires_grad_())
    compare(compiled, given, mask_of(9, 9, mask, torch.float32), mask == "none", 1e-5)


@pytest.mark.usefixtures("plain")
def test_gradients_far_smaller_than_the_nulls():
    query, key, value, c = given = inputs()
    for size in (1e-12, 1e-40, 1e-300):
        out, null = by_cuda_flash(query, key, value, None, True, c)
        grads = torch.autograd.grad((out.sum() * size + null.sum()), given[:2])
        out, null = by_cuda_flash(query, key, value, None, True, c)
        alone = torch.autograd.grad(null.sum(), given[:2])
        for got, wanted in zip(grads, alone, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@needs_cuda
@pytest.mark.parametrize("backend", [None, "FLASH_ATTENTION", "EFFICIENT_ATTENTION"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
@pytest.mark.parametrize(("T", "S"), [(64, 64), (1, 77), (33, 90), (40, 21)])
def test_values_and_gradients_on_cuda(backend, dtype, mask, T, S):
    if backend == "FLASH_ATTENTION" and (mask != "none" or dtype == torch.float32 or T != S):
        pytest.skip("the kernel takes no mask, and half precision only")
    kernels = [getattr(SDPBackend, backend)] if backend else list(SDPBackend.__members__.values())

    def call(query, key, value, mask, is_causal, c, null_value=None):
        return null_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, null_logit=c,
            null_value=null_value,
            backend="cuda_flash",
        )  # fmt: skip

    with sdpa_kernel([x for x in kernels if x not in (SDPBackend.ERROR, SDPBackend.OVERRIDEABLE)]):
        given = inputs(T, S, d=64, dtype=dtype, device="cuda")
        tolerance = 5e-5 if dtype == torch.float32 else 4e-2
        null_value = torch.randn(4, 1, 64, device="cuda").requires_grad_()
        for leaves in (given, [*given, null_value]):
            compare(call, leaves, mask_of(T, S, mask, dtype, "cuda"), T == S, tolerance)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "boolean"])
def test_torch_compile_on_cuda(dtype, mask):
    torch._dynamo.reset()
    compiled = torch.compile(by_cuda_flash, backend="aot_eager", fullgraph=True)
    given = inputs(40, 40, d=64, dtype=dtype, device="cuda")
    given[3] = given[3].detach().float().requires_grad_()
    tolerance = 5e-5 if dtype == torch.float32 else 4e-2
    compare(compiled, given, mask_of(40, 40, mask, dtype, "cuda"), mask == "none", tolerance)


@needs_cuda
def test_nothing_waits_for_the_device():
    query = torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    null_attention(query, query, query, is_causal=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for mask in (None, torch.ones(64, 64, dtype=torch.bool, device="cuda").tril()):
            out, null = null_attention(query, query, query, attn_mask=mask, is_causal=True)
            (out.float().sum() + null.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
