"""null_attention against forms that share no code with it, in float64, gradients included."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from oasis_attn import UserError
from oasis_attn.ops import null_attention
from oasis_attn.ops.null_attention import attend
from oasis_attn.ops.null_attention.flex import causal_blocks

BACKENDS = ("naive", "cpu_flash")


def concatenated(query, key, value, visible, c):
    """Concatenate the null logit, softmax, drop the column."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~visible, -math.inf)
    column = c.reshape(-1, 1, 1).expand(*scores.shape[:2], scores.shape[2], 1)
    p = torch.cat([scores, column], -1).softmax(-1)
    return p[..., :-1] @ value, p[..., -1]


def tensors(T, S, H=4, G=2, d=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, H, T, d), (2, G, S, d), (2, G, S, d), (H,))
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    ]


def masks(T, S, seed=1):
    boolean = torch.rand(2, 1, T, S, generator=torch.Generator().manual_seed(seed)) > 0.3
    boolean[0, 0, T // 2] = False  # one query that may see nothing
    additive = torch.zeros(boolean.shape, dtype=torch.float64).masked_fill(~boolean, -math.inf)
    return {"none": None, "boolean": boolean, "additive": additive}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (5, 5), (63, 63), (1, 9), (7, 20), (9, 4)])
def test_values_and_gradients_equal_the_concatenated_form(backend, mask, T, S):
    inputs = tensors(T, S)
    given = masks(T, S)[mask]
    visible = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    if given is not None:
        visible = visible & masks(T, S)["boolean"]
    upstream = torch.Generator().manual_seed(2)
    grad_out = torch.randn(2, 4, T, 8, generator=upstream, dtype=torch.float64)
    grad_null = torch.randn(2, 4, T, generator=upstream, dtype=torch.float64)
    for out_weight, null_weight in ((1, 0), (0, 1), (1, 1)):

        def loss(out, null, a=out_weight, b=null_weight):
            return a * (out * grad_out).sum() + b * (null * grad_null).sum()

        # A row with nothing to see makes the oracle's own gradient NaN-free because c is finite.
        expected = concatenated(*inputs[:3], visible, inputs[3])
        actual = null_attention(
            *inputs[:3], attn_mask=given, is_causal=True, null_logit=inputs[3], backend=backend
        )
        pairs = [*zip(actual, expected, strict=True)]
        gradients = [torch.autograd.grad(loss(*pair), inputs) for pair in (actual, expected)]
        for got, wanted in [*pairs, *zip(*gradients, strict=True)]:
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strided", [0, 1, 2])
@pytest.mark.parametrize("width", [3, 8, 13])
def test_any_layout_and_any_width_of_the_values(backend, strided, width):
    query, key, value, c = tensors(6, 6)
    value = torch.randn(2, 2, 6, width, dtype=torch.float64).requires_grad_()
    inputs = [query, key, value, c]
    given = list(inputs)
    with torch.no_grad():  # the same numbers, the last axis not the one whose entries are adjacent
        given[strided] = inputs[strided].mT.contiguous().mT.requires_grad_()
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = concatenated(*inputs[:3], visible, c)
    actual = null_attention(*given[:3], is_causal=True, null_logit=c, backend=backend)
    weight = torch.randn(2, 4, 6, width, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((out * weight).sum() + null.sum(), leaves)
        for (out, null), leaves in ((actual, given), (expected, inputs))
    ]
    for got, wanted in [*zip(actual, expected, strict=True), *zip(*gradients, strict=True)]:
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_of_a_wider_dtype_blinds_too(backend):
    query = torch.randn(1, 2, 4, 8, dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, 4, 4)
    mask[:, :, 1] = torch.finfo(torch.float32).min  # -inf in bfloat16
    out, null = null_attention(query, query, query, attn_mask=mask, backend=backend)
    assert null[:, :, 1].eq(1).all()
    assert null[:, :, 0].lt(0.9).all()
    assert out.isfinite().all()


def test_a_float32_mask_of_float64_tensors_is_read_as_float32():
    *inputs, c = tensors(33, 33)
    mask = torch.randn(2, 1, 33, 33).masked_fill(~masks(33, 33)["boolean"], -math.inf)
    given = [null_attention(*inputs, attn_mask=x, null_logit=c) for x in (mask, mask.double())]
    loss = [out.sum() + null.sum() for out, null in given]
    pairs = (
        zip(*given, strict=True),
        zip(*(torch.autograd.grad(x, inputs) for x in loss), strict=True),
    )
    assert all(torch.equal(*pair) for each in pairs for pair in each)


def test_autocast_leaves_the_map_in_float32():
    query, key, value, _ = tensors(9, 9, dtype=torch.float32)
    plain = null_attention(query, key, value, backend="naive")
    with torch.autocast("cpu", torch.bfloat16):
        cast = null_attention(query, key, value, backend="naive")
    assert all(map(torch.equal, cast, plain))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    query, key, value, c = tensors(4, 5, H=2, G=1, d=3)

    def both(query, key, value, c):
        return null_attention(query, key, value, is_causal=True, null_logit=c, backend=backend)

    assert torch.autograd.gradcheck(both, (query, key, value, c))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 63, 1000])
@pytest.mark.parametrize("null_logit", [0.0, 5.0])
def test_low_precision_follows_float64(dtype, T, null_logit):
    wide = [x.detach().to(dtype) for x in tensors(T, T)[:3]]
    grad_out = torch.ones(2, 4, T, 8)
    grad_null = torch.full((2, 4, T), 0.5)
    results = {}
    for precision in (torch.float64, dtype):
        inputs = [x.to(precision).requires_grad_() for x in wide]
        out, null = null_attention(*inputs, is_causal=True, null_logit=null_logit)
        grads = torch.autograd.grad(
            (out, null), inputs, (grad_out.to(out.dtype), grad_null.to(null.dtype))
        )
        results[precision] = (out, null, *grads)
    rtol, atol = (1e-4, 2e-5) if dtype == torch.float32 else (5e-2, 5e-2)
    for low, high in zip(results[dtype], results[torch.float64], strict=True):
        scale = high.abs().max().clamp(min=1).item()
        torch.testing.assert_close(low.double(), high, rtol=rtol, atol=atol * scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(backend, size, dtype):
    query = torch.full((1, 2, 6, 4), 1.0, dtype=dtype, requires_grad=True)
    key = torch.full((1, 2, 6, 4), size / 2, dtype=dtype, requires_grad=True)
    value = torch.randn(1, 2, 6, 4, dtype=dtype, requires_grad=True)
    out, null = null_attention(query, key, value, is_causal=True, backend=backend)
    assert null.eq(0 if size > 0 else 1).all()
    (out.sum() + null.sum()).backward()
    for x in (out, query.grad, key.grad, value.grad):
        assert x.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_null_is_exact_where_subtraction_cancels(backend):
    query = torch.full((1, 1, 1, 1), 60.0)
    key = torch.ones(1, 1, 1, 1)
    _, null = null_attention(query, key, key, backend=backend)
    assert null.item() == pytest.approx(math.exp(-60), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("null_logit", [0.0, -math.inf])
def test_a_query_that_sees_nothing(backend, null_logit):
    query, key, value, _ = tensors(3, 3)
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    mask[:, :, 1] = False
    out, null = null_attention(
        query, key, value, attn_mask=mask, null_logit=null_logit, backend=backend
    )
    assert out[:, :, 1].eq(0).all()
    assert null[:, :, 1].eq(1).all()
    attended = attend(query, key, value, attn_mask=mask, null_logit=null_logit, backend=backend)
    assert attended.lse_BHT.isfinite().all()
    for gradient in torch.autograd.grad(out.sum() + null.sum(), (query, key, value)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "naive", "cpu_flash", "flex"])
@pytest.mark.parametrize("null_logit", [0.0, -math.inf])
def test_without_keys_all_is_on_the_null(backend, null_logit):
    query, key, value, _ = (x.detach() for x in tensors(3, 0))
    keywords = {"null_logit": null_logit, "is_causal": True, "backend": backend}
    out, null = null_attention(query, key, value, **keywords)
    assert out.shape == query.shape
    assert out.eq(0).all()
    assert null.eq(1).all()
    query.requires_grad_()
    out, null = null_attention(query, key, value, **keywords)
    assert torch.autograd.grad(out.sum() + null.sum(), query)[0].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_null_logit_of_infinity_takes_all(backend):
    query, key, value, c = tensors(3, 4)
    for infinite in (math.inf, torch.full_like(c, math.inf).requires_grad_()):
        out, null = null_attention(query, key, value, null_logit=infinite, backend=backend)
        assert out.eq(0).all()
        assert null.eq(1).all()
        for gradient in torch.autograd.grad(out.sum() + null.sum(), (query, key, value)):
            assert gradient.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_only_floating_point(dtype):
    wrong = [x.detach().to(dtype) for x in tensors(3, 3)[:3]]
    with pytest.raises(UserError, match=f"query: dtype {dtype} is not floating point"):
        null_attention(*wrong)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_that_are_not_positive(backend, scale):
    query, key, value, c = inputs = tensors(5, 5)
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = concatenated(query * scale * math.sqrt(8), key, value, visible, c)
    actual = null_attention(
        query, key, value, is_causal=True, scale=scale, null_logit=c, backend=backend
    )
    gradients = [
        torch.autograd.grad(out.sum() + null.sum(), inputs) for out, null in (actual, expected)
    ]
    for got, wanted in [*zip(actual, expected, strict=True), *zip(*gradients, strict=True)]:
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (5,), (4, 1), (4, 5), (4, 4, 5), (1, 4, 5)])
def test_masks_broadcast_as_those_of_scaled_dot_product_attention(backend, shape):
    query, key, value, _ = tensors(4, 5)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    mask = torch.randn(shape, dtype=torch.float64)
    out, _ = null_attention(
        query, key, value, attn_mask=mask, null_logit=-math.inf, backend=backend
    )
    plain = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask.expand(4, 5)[None, None] if mask.dim() < 3 else mask
    )
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("T", [2, 100, 128, 129, 513])
@pytest.mark.parametrize("S", [1, 100, 128, 256, 640])
def test_causal_blocks_are_those_of_the_whole_mask(T, S):
    blocks = causal_blocks(T, S, torch.device("cpu"))
    whole = create_block_mask(lambda _b, _h, t, s: s <= t + S - T, None, None, T, S, device="cpu")
    assert blocks.seq_lengths == whole.seq_lengths
    for name in ("kv", "q", "full_kv", "full_q"):
        for part in ("num_blocks", "indices"):
            assert torch.equal(*(getattr(x, f"{name}_{part}") for x in (blocks, whole)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_is_plain_softmax(backend):
    query, key, value, _ = tensors(9, 9, G=4)
    out, null = null_attention(
        query, key, value, is_causal=True, null_logit=-math.inf, backend=backend
    )
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-12)
    assert null.eq(0).all()


def test_every_probability_follows_from_the_log_sum_exp():
    query, key, value, c = tensors(5, 7)
    visible = torch.ones(5, 7, dtype=torch.bool).tril(2)
    totals = [
        attend(query, key, value, is_causal=True, null_logit=c, backend=backend).lse_BHT
        for backend in BACKENDS
    ]
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(8)
    scores = scores.masked_fill(~visible, -math.inf)
    expected = torch.logaddexp(scores.logsumexp(-1), c[:, None])
    for total in totals:
        torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)


def test_flex_forward_equals_naive_on_the_cpu():
    query, key, value, c = (x.detach().float() for x in tensors(16, 16, d=16))
    mask = masks(16, 16)["boolean"]
    for keywords in ({"is_causal": True}, {"attn_mask": mask}, {"softcap": 2.0}):
        flex, naive = (
            null_attention(query, key, value, null_logit=c, backend=backend, **keywords)
            for backend in ("flex", "naive")
        )
        for got, wanted in zip(flex, naive, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_values_and_gradients_on_cuda():
    wide = [x.detach().float().cuda().requires_grad_() for x in tensors(128, 128, d=64)[:3]]
    results = []
    for backend in ("flex", "naive"):
        out, null = null_attention(*wide, is_causal=True, backend=backend)
        results.append((out, null, *torch.autograd.grad(out.sum() + null.sum(), wide)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)


def test_dropout_is_naive_and_keeps_the_null_probability():
    query, key, value, _ = tensors(6, 6)
    _, null = null_attention(query, key, value, backend="naive")
    _, dropped = null_attention(query, key, value, dropout=0.5, backend="naive")
    torch.testing.assert_close(dropped, null)
    with pytest.warns(UserWarning, match="falls back to 'naive'"):
        null_attention(query, key, value, dropout=0.5)


def test_cpu_flash_keeps_no_map():
    saved = []
    query, key, value, _ = tensors(64, 64)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.shape) or x, lambda x: x
    ):
        null_attention(query, key, value, is_causal=True, backend="cpu_flash")
    assert saved
    assert all(shape[-2:] != (64, 64) for shape in saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "flash"}, "backend: 'flash' is not one of .*did you mean 'cpu_flash'"),
        (
            {"dropout": 0.1, "backend": "cpu_flash"},
            "backend: 'cpu_flash' does not support.*dropout 0.1",
        ),
        ({"softcap": 30.0, "backend": "cpu_flash"}, "no softcap .softcap=30.0."),
        ({"backend": "flex"}, "on the CPU it has no backward"),
        ({"attn_mask": torch.ones(3, 3, dtype=torch.bool)}, r"attn_mask: shape \[3, 3\]"),
        (
            {"attn_mask": torch.ones(2, 5, 5) > 0},
            r"\[2, 5, 5\] does not broadcast to \[2, 4, 5, 5\]",
        ),
        ({"attn_mask": torch.ones(2, 1, 5, 5, dtype=torch.int64)}, "attn_mask: dtype torch.int64"),
        ({"null_logit": torch.zeros(3)}, r"null_logit: shape \[3\]"),
        ({"key": torch.zeros(2, 3, 5, 8, dtype=torch.float64)}, "query heads must be a multiple"),
        ({"key": torch.zeros(5, 8)}, "four axes"),
        ({"query": torch.zeros(2, 0, 5, 8)}, "at least one head"),
        ({"null_logit": None}, "null_logit: None is neither a number nor"),
        ({"null_logit": "a"}, "null_logit: 'a' is neither a number nor"),
        ({"null_logit": [0.0, 1.0]}, r"null_logit: shape \[2\] is neither \[\] nor \[4\]"),
        ({"null_logit": math.nan}, "null_logit: nan is not a number"),
        ({"null_logit": torch.zeros(4, dtype=torch.complex64)}, "complex64 is not real"),
        ({"scale": math.nan}, "scale: nan is not a finite number"),
        ({"softcap": 0.0}, "softcap: 0.0 is not a finite number above 0"),
        ({"dropout": 1.5}, "dropout: 1.5 is not a probability"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    query, key, value, _ = tensors(5, 5)
    keywords = {"query": query, "key": key, "value": value} | change
    with pytest.raises(UserError, match=message) as raised:
        null_attention(**keywords)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("backend", ["naive", "cpu_flash"])
def test_a_whole_number_of_any_size_is_a_scale_or_refused(backend):
    query = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    for scale in (1, 10**20):
        as_int, as_float = (
            null_attention(query, query, query, scale=each, backend=backend)[0]
            for each in (scale, float(scale))
        )
        assert torch.equal(as_int, as_float)
    with pytest.raises(UserError, match="scale: 1000"):
        null_attention(query, query, query, scale=10**400, backend=backend)
    with pytest.raises(UserError, match="null_logit: 1000"):
        null_attention(query, query, query, null_logit=10**400, backend=backend)
    with pytest.raises(UserError, match="attn_mask: 'x' is not a tensor"):
        null_attention(query, query, query, attn_mask="x", backend=backend)
