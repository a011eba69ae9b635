"""Fake quantization against exact rational arithmetic, and property tests."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from oasis_attn.errors import UserError
from oasis_attn.quantization.primitives import compute_qparams, fake_quantize, to_blocks
from oasis_attn.quantization.quantizers import fake_quantize_dynamic
from oasis_attn.quantization.spec import GRANULARITIES, QuantSpec

GROUP = 3
KINDS = [(granularity, symmetric) for granularity in GRANULARITIES for symmetric in (True, False)]


def make_spec(bits, granularity, symmetric):
    group_size = GROUP if granularity == "group" else None
    return QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity, group_size=group_size)


@st.composite
def tensors(draw):
    shape = (
        *draw(array_shapes(min_dims=1, max_dims=2, max_side=4)),
        GROUP * draw(st.integers(1, 3)),
    )
    entries = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from(
        [0.0, -1.0, 1e-42, 22_552.0]
    )
    return torch.from_numpy(draw(arrays("float32", shape, elements=entries)))


@st.composite
def cases(draw):
    granularity, symmetric = draw(st.sampled_from(KINDS))
    return draw(tensors()), make_spec(draw(st.integers(2, 8)), granularity, symmetric)


def own_qparams(x, spec):
    blocks = to_blocks(x, spec)
    return blocks, compute_qparams(
        blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True), spec
    )


@given(cases())
@settings(max_examples=150, deadline=None)
def test_no_value_moves_by_more_than_half_a_step(case):
    x, spec = case
    blocks, qparams = own_qparams(x, spec)
    error = (fake_quantize_dynamic(x, spec).view(blocks.shape).double() - blocks.double()).abs()
    assert (error <= qparams.scale.double() * (0.5 + 1e-4)).all()


@given(cases())
@settings(max_examples=100, deadline=None)
def test_zero_is_exact_and_the_number_of_values_is_limited(case):
    x, spec = case
    blocks, qparams = own_qparams(x, spec)
    rounded = fake_quantize(blocks, qparams)
    assert (rounded[blocks == 0] == 0).all()
    assert (fake_quantize(torch.zeros_like(blocks), qparams) == 0).all()
    assert all(
        len(block.unique()) <= 2**spec.bits for block in rounded.reshape(-1, blocks.shape[-1])
    )
    assert ((qparams.quant_max - qparams.quant_min) == 2**spec.bits - 1).all()


@given(cases())
@settings(max_examples=100, deadline=None)
def test_quantizing_twice_equals_quantizing_once(case):
    x, spec = case
    blocks, qparams = own_qparams(x, spec)
    once = fake_quantize(blocks, qparams)
    assert torch.equal(fake_quantize(once, qparams), once)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_agrees_with_exact_arithmetic(bits, symmetric):
    torch.manual_seed(bits)
    x = torch.randn(50, dtype=torch.float64) * 3 + 1
    spec = make_spec(bits, "tensor", symmetric)
    values = [Fraction(v) for v in x.tolist()]
    if symmetric:
        scale = max(map(abs, values)) / (2 ** (bits - 1) - 1)
        quant_min, quant_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        low, high = min(0, *values), max(0, *values)
        scale = (high - low) / (2**bits - 1)
        quant_min = round(low / scale)
        quant_max = quant_min + 2**bits - 1
    expected = [float(scale * min(max(round(v / scale), quant_min), quant_max)) for v in values]
    torch.testing.assert_close(
        fake_quantize_dynamic(x, spec).tolist(), expected, rtol=1e-12, atol=1e-12
    )


def test_agrees_with_torch_on_eight_bits():
    torch.manual_seed(0)
    x = torch.randn(4, 7)
    _, qparams = own_qparams(x, make_spec(8, "tensor", False))
    expected = torch.fake_quantize_per_tensor_affine(
        x, float(qparams.scale), -int(qparams.quant_min), 0, 255
    )
    torch.testing.assert_close(fake_quantize(x, qparams), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("granularity", "symmetric"), KINDS)
@pytest.mark.parametrize("value", [0.0, 1e-45, -3.7, 22_552.0])
def test_constant_blocks_do_not_change(granularity, symmetric, value):
    x = torch.full((2, 2 * GROUP), value)
    quantized = fake_quantize_dynamic(x, make_spec(4, granularity, symmetric))
    torch.testing.assert_close(quantized, x, rtol=1e-6, atol=1e-38)


def test_each_block_has_its_own_scale():
    x = torch.tensor([[1.0, 0.5, 0.1, 1000.0, 500.0, 100.0], [1e-3, 5e-4, 1e-4, 0.0, 0.0, 0.0]])
    error = {
        granularity: ((fake_quantize_dynamic(x, make_spec(8, granularity, True)) - x).abs() / x)[
            0, 0
        ].item()
        for granularity in GRANULARITIES
    }
    assert error["tensor"] == error["channel"] == error["token"] == 1.0
    assert error["group"] < 1e-6
    rows = fake_quantize_dynamic(x, make_spec(8, "token", True))
    torch.testing.assert_close(rows[1, :1], x[1, :1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_dtype_and_rounds_in_float32(dtype):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    spec = make_spec(8, "token", False)
    quantized = fake_quantize_dynamic(x, spec)
    assert quantized.dtype == dtype
    torch.testing.assert_close(quantized, fake_quantize_dynamic(x.double(), spec).to(dtype))


@pytest.mark.parametrize(("granularity", "symmetric"), KINDS)
def test_an_empty_tensor_stays_empty(granularity, symmetric):
    x = torch.empty(0, GROUP)
    assert fake_quantize_dynamic(x, make_spec(8, granularity, symmetric)).shape == x.shape


def test_gradient_passes_straight_through_and_stops_where_clipped():
    spec = make_spec(4, "tensor", True)
    qparams = compute_qparams(torch.tensor([-1.0]), torch.tensor([1.0]), spec)
    x = torch.tensor([-5.0, -1.0, -0.26, 0.0, 0.77, 1.0, 5.0], requires_grad=True)
    weights = torch.arange(1.0, 8.0)
    (fake_quantize(x, qparams) * weights).sum().backward()
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0]


def test_fixed_qparams_clip_infinity_and_keep_nan():
    qparams = compute_qparams(
        torch.tensor([-1.0]), torch.tensor([1.0]), make_spec(8, "tensor", False)
    )
    rounded = fake_quantize(torch.tensor([torch.inf, -torch.inf, torch.nan]), qparams)
    assert rounded[0].item() == pytest.approx(1, abs=0.01)
    assert rounded[1].item() == pytest.approx(-1, abs=0.01)
    assert rounded[2].isnan()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(("granularity", "symmetric"), KINDS)
def test_refuses_what_is_not_finite(granularity, symmetric, bad):
    x = torch.ones(2, GROUP)
    x[1, 1] = bad
    with pytest.raises(UserError, match=r"^weight: holds NaN or infinity"):
        fake_quantize_dynamic(x, make_spec(8, granularity, symmetric), name="weight")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "bits: 1 "),
        ({"bits": 9}, "bits: 9 "),
        ({"bits": True}, "bits: True "),
        ({"bits": 4.5}, "bits: 4.5 "),
        ({"bits": 4.0}, "bits: 4.0 "),
        ({"symmetric": "False"}, "symmetric: 'False' is neither true nor false"),
        ({"symmetric": None}, "symmetric: None "),
        ({"granularity": "chanel"}, "did you mean 'channel'"),
        ({"granularity": "group"}, "group_size: None "),
        ({"group_size": 32}, "group_size: 32 does not go"),
        ({"granularity": "group", "group_size": 0}, "group_size: 0 "),
        ({"granularity": "group", "group_size": 16.0}, "group_size: 16.0 "),
    ],
)
def test_refuses_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        QuantSpec(**{"bits": 8, "symmetric": True} | settings)


def test_refuses_groups_that_do_not_divide():
    with pytest.raises(UserError, match="group_size: 3 does not divide the 7 entries of weight"):
        fake_quantize_dynamic(torch.ones(2, 7), make_spec(4, "group", True), name="weight")
