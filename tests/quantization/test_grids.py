"""Laws of the grids, against a form written in exact rational arithmetic, and by property."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from oasis_attn.errors import UserError
from oasis_attn.quantization.grids import GRANULARITIES, Grid, place, snap, to_blocks
from oasis_attn.quantization.quantizers import fake_quantize

GROUP = 3
KINDS = [(granularity, symmetric) for granularity in GRANULARITIES for symmetric in (True, False)]


def make_grid(bits, granularity, symmetric):
    group_size = GROUP if granularity == "group" else None
    return Grid(bits=bits, symmetric=symmetric, granularity=granularity, group_size=group_size)


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
    return draw(tensors()), make_grid(draw(st.integers(2, 8)), granularity, symmetric)


def own_levels(x, grid):
    blocks = to_blocks(x, grid)
    return blocks, place(blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True), grid)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_no_value_moves_by_more_than_half_a_step(case):
    x, grid = case
    blocks, levels = own_levels(x, grid)
    error = (fake_quantize(x, grid).view(blocks.shape).double() - blocks.double()).abs()
    assert (error <= levels.scale.double() * (0.5 + 1e-4)).all()


@given(cases())
@settings(max_examples=100, deadline=None)
def test_zero_is_exact_and_levels_are_few(case):
    x, grid = case
    blocks, levels = own_levels(x, grid)
    snapped = snap(blocks, levels)
    assert (snapped[blocks == 0] == 0).all()
    assert (snap(torch.zeros_like(blocks), levels) == 0).all()
    assert all(
        len(block.unique()) <= 2**grid.bits for block in snapped.reshape(-1, blocks.shape[-1])
    )
    assert ((levels.highest - levels.lowest) == 2**grid.bits - 1).all()


@given(cases())
@settings(max_examples=100, deadline=None)
def test_quantising_twice_is_quantising_once(case):
    x, grid = case
    blocks, levels = own_levels(x, grid)
    once = snap(blocks, levels)
    assert torch.equal(snap(once, levels), once)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_agrees_with_exact_arithmetic(bits, symmetric):
    torch.manual_seed(bits)
    x = torch.randn(50, dtype=torch.float64) * 3 + 1
    grid = make_grid(bits, "tensor", symmetric)
    values = [Fraction(v) for v in x.tolist()]
    if symmetric:
        scale = max(map(abs, values)) / (2 ** (bits - 1) - 1)
        lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        low, high = min(0, *values), max(0, *values)
        scale = (high - low) / (2**bits - 1)
        lowest = round(low / scale)
        highest = lowest + 2**bits - 1
    expected = [float(scale * min(max(round(v / scale), lowest), highest)) for v in values]
    torch.testing.assert_close(fake_quantize(x, grid).tolist(), expected, rtol=1e-12, atol=1e-12)


def test_agrees_with_torch_on_eight_bits():
    torch.manual_seed(0)
    x = torch.randn(4, 7)
    _, levels = own_levels(x, make_grid(8, "tensor", False))
    expected = torch.fake_quantize_per_tensor_affine(
        x, float(levels.scale), -int(levels.lowest), 0, 255
    )
    torch.testing.assert_close(snap(x, levels), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("granularity", "symmetric"), KINDS)
@pytest.mark.parametrize("value", [0.0, 1e-45, -3.7, 22_552.0])
def test_constant_blocks_stay(granularity, symmetric, value):
    x = torch.full((2, 2 * GROUP), value)
    quantized = fake_quantize(x, make_grid(4, granularity, symmetric))
    torch.testing.assert_close(quantized, x, rtol=1e-6, atol=1e-38)


def test_each_block_has_its_own_scale():
    x = torch.tensor([[1.0, 0.5, 0.1, 1000.0, 500.0, 100.0], [1e-3, 5e-4, 1e-4, 0.0, 0.0, 0.0]])
    error = {
        granularity: ((fake_quantize(x, make_grid(8, granularity, True)) - x).abs() / x)[
            0, 0
        ].item()
        for granularity in GRANULARITIES
    }
    assert error["tensor"] == error["channel"] == error["token"] == 1.0
    assert error["group"] < 1e-6
    rows = fake_quantize(x, make_grid(8, "token", True))
    torch.testing.assert_close(rows[1, :1], x[1, :1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_dtype_and_rounds_in_float32(dtype):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    grid = make_grid(8, "token", False)
    quantized = fake_quantize(x, grid)
    assert quantized.dtype == dtype
    torch.testing.assert_close(quantized, fake_quantize(x.double(), grid).to(dtype))


@pytest.mark.parametrize(("granularity", "symmetric"), KINDS)
def test_empty_stays_empty(granularity, symmetric):
    x = torch.empty(0, GROUP)
    assert fake_quantize(x, make_grid(8, granularity, symmetric)).shape == x.shape


def test_gradient_passes_straight_through_and_stops_where_clipped():
    grid = make_grid(4, "tensor", True)
    levels = place(torch.tensor([-1.0]), torch.tensor([1.0]), grid)
    x = torch.tensor([-5.0, -1.0, -0.26, 0.0, 0.77, 1.0, 5.0], requires_grad=True)
    weights = torch.arange(1.0, 8.0)
    (snap(x, levels) * weights).sum().backward()
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0]


def test_static_levels_clip_infinity_and_keep_nan():
    levels = place(torch.tensor([-1.0]), torch.tensor([1.0]), make_grid(8, "tensor", False))
    snapped = snap(torch.tensor([torch.inf, -torch.inf, torch.nan]), levels)
    assert snapped[0].item() == pytest.approx(1, abs=0.01)
    assert snapped[1].item() == pytest.approx(-1, abs=0.01)
    assert snapped[2].isnan()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(("granularity", "symmetric"), KINDS)
def test_refuses_what_is_not_finite(granularity, symmetric, bad):
    x = torch.ones(2, GROUP)
    x[1, 1] = bad
    with pytest.raises(UserError, match=r"^weight: holds NaN or infinity"):
        fake_quantize(x, make_grid(8, granularity, symmetric), site="weight")


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
        Grid(**{"bits": 8, "symmetric": True} | settings)


def test_refuses_groups_that_do_not_divide():
    with pytest.raises(UserError, match="group_size: 3 does not divide the 7 entries of weight"):
        fake_quantize(torch.ones(2, 7), make_grid(4, "group", True), site="weight")
