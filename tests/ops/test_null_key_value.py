"""Nulls with a key and a value, against the same keys and values in front of the sequence."""

import math

import pytest
import torch

from oasis_attn import UserError
from oasis_attn.ops import c_kernels, null_attention
from oasis_attn.ops.null_attention import attend, decode_attention

BACKENDS = ("naive", "cpu_flash")
FORMS = ("value", "key", "key_value")


def concatenated(query, key, value, visible, c, null_key, null_value, *, softcap=None):
    """Softmax attention over the nulls and the keys: output and probability of the nulls."""
    (B, H), d = query.shape[:2], query.shape[-1]
    key, value = (x.repeat_interleave(H // x.shape[1], 1) for x in (key, value))
    if null_key is None:
        null_key = query.new_zeros(H, 1, d)
    M = null_key.shape[1]
    if null_value is None:
        null_value = query.new_zeros(H, M, value.shape[-1])
    null_key, null_value = (x.repeat_interleave(H // len(x), 0) for x in (null_key, null_value))
    keys, values = (
        torch.cat([x.expand(B, -1, -1, -1), y], 2)
        for x, y in ((null_key, key), (null_value, value))
    )
    scores = query @ keys.mT / math.sqrt(d)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    bias = torch.cat([c.reshape(-1, 1, 1).expand(H, 1, M), scores.new_zeros(H, 1, key.shape[2])], 2)
    shown = torch.nn.functional.pad(visible, (M, 0), value=True)
    p = (scores + bias).masked_fill(~shown, -math.inf).softmax(-1)
    return p @ values, p[..., :M].sum(-1)


def tensors(T, S, form="key_value", *, M=1, heads=4, B=2, H=4, G=2, d=8, own=6):
    """query, key, value, null logit, null key and null value; those the form lacks are None."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, T, d), (B, G, S, d), (B, G, S, own), (H,), (heads, M, d), (heads, M, own)]
    made = [torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes]
    made = [x.requires_grad_() for x in made]
    if form == "value":
        made[4] = None
    elif form == "key":
        made[5] = None
    return made


def call(inputs, **keywords):
    query, key, value, c, null_key, null_value = inputs
    return null_attention(
        query, key, value, null_logit=c, null_key=null_key, null_value=null_value, **keywords
    )


def equal(actual, expected, inputs):
    """Outputs, and the gradients of random combinations of them."""
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in expected]
    leaves = [x for x in inputs if x is not None]
    pairs = [*zip(actual, expected, strict=True)]
    for chosen in ((0,), (1,), (0, 1)):
        results = [
            torch.autograd.grad(
                [side[i] for i in chosen],
                leaves,
                [upstream[i] for i in chosen],
                retain_graph=True,
                allow_unused=True,
            )
            for side in (actual, expected)
        ]
        pairs += [
            (torch.zeros_like(x) if got is None else got, torch.zeros_like(x) if w is None else w)
            for x, got, w in zip(leaves, *results, strict=True)
        ]
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def window(T, S, size=3):
    """A sliding window; the keys of one query of the first sequence are all masked."""
    behind = torch.arange(T)[:, None] + S - T - torch.arange(S)
    visible = ((behind >= 0) & (behind < size)).repeat(2, 1, 1, 1)
    visible[0, 0, T // 2] = False
    return visible


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("heads", [4, 2], ids=["of queries", "of keys"])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (9, 9), (1, 9), (7, 20), (9, 4)])
def test_values_and_gradients(backend, form, M, heads, T, S):
    if form == "value" and M > 1:
        pytest.skip("nulls that differ in their value alone are one null")
    inputs = tensors(T, S, form, M=M, heads=heads)
    visible = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    equal(
        call(inputs, is_causal=True, backend=backend),
        concatenated(*inputs[:3], visible, *inputs[3:]),
        inputs,
    )
    mask = window(T, S)
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    expected = concatenated(*inputs[:3], mask, *inputs[3:])
    for given in (mask, additive):
        equal(call(inputs, attn_mask=given, backend=backend), expected, inputs)


@pytest.mark.parametrize("form", FORMS)
def test_softcap(form):
    inputs = tensors(7, 7, form)
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    expected = concatenated(*inputs[:3], visible, *inputs[3:], softcap=0.7)
    equal(call(inputs, is_causal=True, softcap=0.7, backend="naive"), expected, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("M", [1, 2])
def test_gradcheck(backend, M):
    inputs = tensors(4, 5, M=M, H=2, G=1, d=3, own=3, heads=2)

    def both(*inputs):
        return call(inputs, is_causal=True, backend=backend)

    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("c", [0.0, -math.inf, math.inf])
def test_a_query_without_keys_gets_the_value_of_the_null(backend, form, c):
    query, key, value, _, null_key, null_value = inputs = tensors(5, 5, form)
    inputs[3] = c
    mask = window(5, 5)
    out, null = call(inputs, attn_mask=mask, backend=backend)
    assert null[0, :, 2].eq(1).all()
    expected = torch.zeros(4, 6) if null_value is None else null_value[:, 0]
    torch.testing.assert_close(out[0, :, 2], expected.to(out), rtol=0, atol=1e-12)
    leaves = [x for x in (query, key, value, null_key, null_value) if x is not None]
    for gradient in torch.autograd.grad(out.sum() + null.square().sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, "flex"])
def test_without_keys_all_is_on_the_null(backend):
    inputs = [x.detach() for x in tensors(3, 0, M=2)]
    out, null = call(inputs, backend=backend)
    assert null.eq(1).all()
    shares = (inputs[0] @ inputs[4].mT / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(out, shares @ inputs[5], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_null_that_is_switched_off_changes_nothing(backend):
    inputs = tensors(6, 6, M=2)
    plain = null_attention(*inputs[:3], is_causal=True, null_logit=-math.inf, backend=backend)
    for off in (-1e4, -math.inf):
        inputs[3] = off
        out, null = call(inputs, is_causal=True, backend=backend)
        assert null.eq(0).all()
        torch.testing.assert_close(out, plain[0], rtol=0, atol=1e-12)
        for gradient in torch.autograd.grad(out.sum() + null.sum(), inputs[4:]):
            assert gradient.eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("M", [1, 3])
def test_the_log_sum_exp_includes_the_nulls(backend, M):
    query, key, value, c, null_key, null_value = tensors(5, 7, M=M)
    scores = [
        query @ x.repeat_interleave(4 // len(x), 0).mT / math.sqrt(8) for x in (null_key, key[0])
    ]
    attended = attend(
        query[:1], key[:1], value[:1], null_logit=c, null_key=null_key, null_value=null_value,
        backend=backend,
    )  # fmt: skip
    expected = torch.cat([scores[0] + c[:, None, None], scores[1]], -1).logsumexp(-1)[:1]
    torch.testing.assert_close(attended.lse_BHT, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("M", [1, 3])
def test_flex_forward_equals_naive_on_the_cpu(form, M):
    inputs = tensors(16, 16, form, M=1 if form == "value" else M, d=16, own=16)
    inputs = [x if x is None else x.detach().float() for x in inputs]
    for keywords in ({"is_causal": True}, {"attn_mask": window(16, 16)}, {"softcap": 2.0}):
        pair = (call(inputs, backend=backend, **keywords) for backend in ("flex", "naive"))
        for got, wanted in zip(*pair, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(c_kernels.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("M", [1, 3])
def test_the_null_of_one_token(form, M):
    inputs = tensors(1, 9, form, M=1 if form == "value" else M, own=8)
    query, key, value, c, *null = (x if x is None else x.detach().float() for x in inputs)
    keywords = {"scale": 0.3, "null_logit": c, "null_key": null[0], "null_value": null[1]}
    with torch.no_grad():
        fast = decode_attention(query, key, value, **keywords)
    plain = null_attention(query, key, value, **keywords, backend="naive")
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 63, 1000])
def test_low_precision_follows_float64(dtype, T):
    wide = [x.detach().to(dtype) for x in tensors(T, T, M=2)]
    grad_out, grad_null = torch.ones(2, 4, T, 6), torch.full((2, 4, T), 0.5)
    results = []
    for precision in (dtype, torch.float64):
        inputs = [x.to(precision).requires_grad_() for x in wide]
        out, null = call(inputs, is_causal=True, backend="cpu_flash")
        grads = torch.autograd.grad(
            (out, null), inputs, (grad_out.to(out.dtype), grad_null.to(null.dtype))
        )
        results.append((out, null, *grads))
    rtol, atol = (1e-4, 2e-5) if dtype == torch.float32 else (5e-2, 5e-2)
    for low, high in zip(*results, strict=True):
        scale = high.abs().max().clamp(min=1).item()
        torch.testing.assert_close(low.double(), high, rtol=rtol, atol=atol * scale)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize(("T", "S"), [(1, 65), (128, 128), (300, 300)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["auto", "flex"])
def test_cuda_follows_float64(dtype, form, M, T, S, masked, backend):
    if form == "value" and M > 1:
        pytest.skip("nulls that differ in their value alone are one null")
    wide = tensors(T, S, form, M=M, d=64, own=64)
    wide = [x if x is None else x.detach().to("cuda", dtype) for x in wide]
    keywords = {"attn_mask": window(T, S, 40).cuda()} if masked else {"is_causal": T == S}
    results = []
    for precision in (dtype, torch.float64):
        inputs = [x if x is None else x.to(precision).requires_grad_() for x in wide]
        chosen = backend if precision == dtype else "naive"
        outs = call(inputs, **keywords, backend=chosen)
        leaves = [x for x in inputs if x is not None]
        grads = torch.autograd.grad(outs[0].sum() + outs[1].square().sum(), leaves)
        results.append((*outs, *grads))
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for low, high in zip(*results, strict=True):
        assert (low.double() - high).norm() <= tolerance * high.norm().clamp(min=1)


def test_logits_too_large_for_the_log_sum_exp():
    inputs = [x if x is None else x.detach().requires_grad_() for x in tensors(6, 6, own=8)]
    mask = torch.full((6, 6), -1e5, dtype=torch.float64)  # finite: the nulls are not masked
    inputs[3] = torch.full((4,), -1e5, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="computes this gradient by 'naive'"):
        results = [
            torch.autograd.grad(out.sum() + null.sum(), inputs)
            for out, null in (call(inputs, attn_mask=mask, backend=name) for name in BACKENDS)
        ]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_dropout_keeps_the_null_probability():
    inputs = tensors(6, 6)
    _, null = call(inputs, backend="naive")
    out, dropped = call(inputs, dropout=1.0, backend="naive")
    torch.testing.assert_close(dropped, null)
    assert out.eq(0).all()


def test_gradients_of_each_sample():
    inputs = tensors(5, 5, M=2)
    query, key, value, c, *null = inputs

    def loss(null_key, null_value, query, key, value):
        out, probability = null_attention(
            query[None], key[None], value[None], is_causal=True, null_logit=c.detach(),
            null_key=null_key, null_value=null_value, backend="cpu_flash",
        )  # fmt: skip
        return out.square().sum() + probability.sum()

    samples = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0, 0, 0))(
        *(x.detach() for x in (*null, query, key, value))
    )
    out, probability = call(inputs, is_causal=True, backend="naive")
    whole = torch.autograd.grad(out.square().sum() + probability.sum(), null)
    for got, wanted in zip(samples, whole, strict=True):
        torch.testing.assert_close(got.sum(0), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"null_key": (4, 8)}, r"null_key: shape \[4, 8\] is not \[heads, nulls, width\] with 4"),
        ({"null_key": (3, 1, 8)}, r"null_key: shape .* 4 query heads or 2 key heads"),
        ({"null_key": (4, 0, 8)}, r"null_key: shape \[4, 0, 8\] is not"),
        ({"null_key": (4, 1, 7)}, r"null_key: shape \[4, 1, 7\] has a width other than .* 8"),
        ({"null_value": (4, 2, 6)}, r"null_value: shape .* has 2 nulls; .* that of null_key"),
        ({"null_key": None, "null_value": (4, 2, 6)}, r"null_value: .* must be 1 without null_key"),
        ({"null_value": (4, 1, 8)}, "null_value: width 8 is not the value's, 6"),
    ],
)
def test_bad_input(change, message):
    query, key, value, c, null_key, null_value = tensors(3, 3)
    given = {"null_key": null_key, "null_value": null_value}
    given |= {name: x if x is None else torch.zeros(x) for name, x in change.items()}
    with pytest.raises(UserError, match=message) as raised:
        null_attention(query, key, value, null_logit=c, **given)
    assert "\n" not in str(raised.value)


def test_only_floating_point():
    query, key, value, *_ = tensors(3, 3)
    with pytest.raises(UserError, match=r"null_key: dtype torch\.int64 is not floating point"):
        null_attention(query, key, value, null_key=torch.ones(4, 1, 8, dtype=torch.int64))
