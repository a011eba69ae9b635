"""FP8, MXFP4, MXFP8 and NVFP4, number by number, against tables, casts and two other libraries."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from oasis_attn.errors import UserError
from oasis_attn.quantization import QuantSpec, schemes
from oasis_attn.quantization.linear import QuantizedLinear
from oasis_attn.quantization.primitives import (
    QParams,
    fake_quantize,
    power_of_two,
    two_level_scales,
)
from oasis_attn.quantization.quantizers import (
    StaticQuantizer,
    fake_quantize_dynamic,
    observe_qparams,
)
from oasis_attn.quantization.spec import FLOAT_TYPES

TABLE = schemes()
FP8, MXFP8, MXFP4, NVFP4 = (
    TABLE[name].weight for name in ("fp8-static", "mxfp8", "mxfp4", "nvfp4")
)
SPECS = {"fp8": FP8, "mxfp8": MXFP8, "mxfp4": MXFP4, "nvfp4": NVFP4}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist()
VALUES = {"e2m1": E2M1, "e4m3": E4M3}


def nearest(x, values):
    """The nearest of `values`, by exact arithmetic; half way, the one with an even index."""
    distances = [abs(Fraction(abs(x)) - Fraction(value)) for value in values]
    least = min(distances)
    found = [i for i, distance in enumerate(distances) if distance == least]
    index = found[0] if len(found) == 1 else next(i for i in found if i % 2 == 0)
    return values[index] if x >= 0 else -values[index]


def rounded(x, element_type, scale=1.0):
    top = torch.tensor(FLOAT_TYPES[element_type].largest)
    return fake_quantize(x, QParams(torch.tensor([scale]), -top, top), element_type)


def wide(*shape, seed=0):
    """Random numbers of very different magnitudes, in runs of 16, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    size = torch.randn((*shape[:-1], shape[-1] // 16, 1), generator=generator).mul(3).exp()
    x = x.unflatten(-1, (-1, 16)) * size
    return x.flatten(-2) * (torch.rand(shape, generator=generator) > 0.02)


@pytest.mark.parametrize("kind", VALUES)
def test_every_number_and_every_half_way_point(kind):
    values = VALUES[kind]
    assert values[-1] == FLOAT_TYPES[kind].largest
    middles = [(low + high) / 2 for low, high in pairwise(values)]
    points = torch.tensor([*values, *middles], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        exact = points.to(dtype)
        around = [exact, exact.nextafter(exact + 1), exact.nextafter(exact - 1)]
        x = torch.cat([*around, *(-each for each in around)])
        assert rounded(x, kind).tolist() == [nearest(each, values) for each in x.tolist()]


def test_e4m3_equals_the_cast():
    x = torch.cat([wide(64, 512).flatten(), torch.linspace(-500, 500, 20_001)])
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(rounded(x, "e4m3"), expected)
    half = x.bfloat16()
    assert torch.equal(
        rounded(half, "e4m3"), half.clamp(-448, 448).to(torch.float8_e4m3fn).to(half)
    )


@pytest.mark.parametrize("kind", VALUES)
def test_values_that_no_number_holds(kind):
    top, least = VALUES[kind][-1], VALUES[kind][1]
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, least / 2, least * 0.51, 1e-45, -0.0])
    found = rounded(x, kind)
    assert found[:2].tolist() == [top, -top]
    assert found[2].isnan()
    assert found[3:].tolist() == [top, 0, least, 0, 0]
    assert found[-1].signbit()


def test_gradient_passes_where_the_value_was_not_clipped():
    x = torch.tensor([-7.1, -6.9, 0.2, 5.1, 6.9, 7.1, 1e30], requires_grad=True)
    rounded(x, "e2m1").sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_of_two(dtype):
    exponents = range(-126, 128)
    for fraction in (1.0, 1.5, 2 - torch.finfo(dtype).eps):
        x = torch.tensor([fraction * 2.0**e for e in exponents], dtype=dtype)
        assert power_of_two(-x).tolist() == [2.0**e for e in exponents]


@pytest.mark.parametrize("spec", [MXFP4, MXFP8], ids=["mxfp4", "mxfp8"])
def test_scales_of_mx(spec):
    """Section 6.3: the largest power of two <= max|x|, over that of the element type."""
    kind = FLOAT_TYPES[spec.element_type]
    largest = [0.0, 1e-45, 2.0**-126, 0.99, 1.0, 1.99, 2.0, 6.0, 7.99, 448.0, 3.4e38]
    x = torch.zeros(len(largest), 32)
    x[:, 7] = -torch.tensor(largest)
    exponents = [-127, -127, -126, -1, 0, 0, 1, 2, 2, 8, 127]
    expected = [2.0 ** max(e - kind.max_exponent, -127) for e in exponents]
    assert observe_qparams(x, spec).scale.flatten().tolist() == expected
    assert (fake_quantize_dynamic(x[:1], spec) == 0).all()


def test_scales_of_nvfp4():
    """E4M3, relative to the scale that makes the largest one 448."""
    x = torch.zeros(1, 80)
    x[0, 0], x[0, 16], x[0, 32], x[0, 48] = -2688.0, 6.6, 1e-3, 1e-9
    scale = observe_qparams(x, NVFP4).scale.flatten()
    assert scale.tolist() == [448, 1.125, 2.0**-9, 2.0**-9, 2.0**-9]
    found = fake_quantize_dynamic(x, NVFP4)[0]
    assert found[[0, 16, 32, 48, 64]].tolist() == [-2688, 6.75, 2.0**-10, 0, 0]
    small = fake_quantize_dynamic(x * 2.0**-100, NVFP4)[0]
    assert torch.equal(small, found * 2.0**-100)
    assert (fake_quantize_dynamic(torch.zeros(2, 32), NVFP4) == 0).all()


def test_nvfp4_with_a_range_from_calibration():
    quantizer = StaticQuantizer(NVFP4, name="in")
    with quantizer.calibrating():
        quantizer(wide(3, 7, 32).clamp(-2688, 2688))
        quantizer(torch.full((1, 1, 16), -2688.0))
    assert quantizer.scale.item() == 448
    x = wide(2, 5, 64, seed=1).clamp(-1000, 1000)
    largest = torch.full((2, 5, 16), 2688.0)  # the scale of this block is that of calibration
    expected = fake_quantize_dynamic(torch.cat([x, largest], -1), NVFP4)[..., :64]
    assert torch.equal(quantizer(x), expected)
    assert not torch.equal(fake_quantize_dynamic(x, NVFP4), expected)
    assert quantizer(torch.full((1, 16), 1e5)).eq(2688).all()  # saturates
    bad = torch.ones(1, 32)
    bad[0, 0], bad[0, 16] = torch.inf, torch.nan
    assert quantizer(bad)[0, 0] == 2688
    assert quantizer(bad)[0, 16:].isnan().all()


def test_both_scales_of_nvfp4_are_found_again():
    for seed in range(300):
        x = wide(2, 64, seed=seed) * 1.01**seed
        qparams = observe_qparams(x, NVFP4)
        numbers, encode = two_level_scales(qparams.scale)
        assert torch.equal(numbers / encode, qparams.scale)
        assert numbers.max() == 448
        assert torch.equal(numbers.to(torch.float8_e4m3fn).float(), numbers)
    zeros = observe_qparams(torch.zeros(2, 64), NVFP4).scale
    numbers, encode = two_level_scales(zeros)
    assert torch.equal(numbers / encode, zeros)
    assert encode.isfinite()


@pytest.mark.parametrize("spec", [FP8, MXFP8, MXFP4], ids=["fp8", "mxfp8", "mxfp4"])
def test_the_mse_observer_lowers_the_error(spec):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    errors = [
        (fake_quantize_dynamic(x, spec, observer=observer) - x).square().sum()
        for observer in ("minmax", "mse")
    ]
    assert errors[1] <= errors[0]


def test_torchao_has_the_same_mx_numbers():
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = wide(64, 256)
    for spec, dtype in ((MXFP4, torch.float4_e2m1fn_x2), (MXFP8, torch.float8_e4m3fn)):
        theirs = mx.MXTensor.to_mx(x, dtype, 32).dequantize(torch.float32)
        assert torch.equal(fake_quantize_dynamic(x, spec), theirs)
        half = x.bfloat16()
        theirs = mx.MXTensor.to_mx(half, dtype, 32).dequantize(torch.bfloat16)
        assert torch.equal(fake_quantize_dynamic(half, spec), theirs)


def test_torchao_has_the_same_nvfp4_numbers():
    """With a power of two as the scale of the tensor, so that no order of operations matters.

    torchao rounds scales below the smallest normal number, 2^-6, up to it.
    """
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = wide(64, 256).clamp(-1344, 1344)
    x[0, 0] = 1344.0
    groups = x.unflatten(-1, (-1, 16))
    x = (groups * (groups.abs().amax(-1, keepdim=True) > 0.1)).flatten(-2)
    scale = nvfp4.per_tensor_amax_to_scale(x.abs().max())
    assert scale == 0.5
    theirs = nvfp4.NVFP4Tensor.to_nvfp4(x, 16, per_tensor_scale=scale).dequantize(torch.float32)
    assert torch.equal(fake_quantize_dynamic(x, NVFP4), theirs)


def test_torchao_rounds_to_e2m1_the_same():
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    x = torch.cat([torch.linspace(-8, 8, 10_001), wide(16, 64).flatten()])
    theirs = kernels.f4_unpacked_to_f32(kernels.f32_to_f4_unpacked(x))
    assert torch.equal(rounded(x, "e2m1"), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", SPECS)
def test_codes_are_inverse(name, dtype):
    """A weight is restored from its codes, in every dtype and after a cast."""
    scheme = replace(TABLE["mxfp4"], weight=SPECS[name], activation=None)
    linear = torch.nn.Linear(64, 24, dtype=dtype)
    qparams = observe_qparams(linear.weight, SPECS[name])
    layer = QuantizedLinear.from_linear(linear, scheme, qparams, name="x")
    assert torch.equal(layer.decode(layer.codes(), dtype), layer.weight)
    expected = fake_quantize_dynamic(linear.weight.detach(), SPECS[name])
    assert torch.equal(layer.weight, expected)
    before = layer.codes()
    assert torch.equal(layer.to(torch.bfloat16).codes(), before)


@pytest.mark.parametrize("name", SPECS)
def test_only_finite_values_and_whole_groups(name):
    spec = SPECS[name]
    for bad in (torch.inf, torch.nan):
        x = torch.ones(2, 64)
        x[1, 5] = bad
        with pytest.raises(UserError, match=r"^weight: holds NaN or infinity"):
            fake_quantize_dynamic(x, spec, name="weight")
    assert fake_quantize_dynamic(torch.empty(0, 64), spec).shape == (0, 64)
    if spec.group_size:
        message = f"group_size: {spec.group_size} does not divide the 40 entries of weight"
        with pytest.raises(UserError, match=message):
            fake_quantize_dynamic(torch.ones(2, 40), spec, name="weight")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"element_type": "e3m0"}, "element_type: 'e3m0' is not one of int, e2m1, e4m3"),
        ({"scale_type": "e8m1"}, "scale_type: 'e8m1' is not one of float32, e8m0, e4m3"),
        ({"element_type": "e4m3"}, "bits: 4 does not go with element_type 'e4m3', which has 8"),
        ({"symmetric": False}, "symmetric: False does not go with element_type 'e2m1'"),
        (
            {"granularity": "tensor", "group_size": None},
            "scale_type: 'e8m0' is for granularity 'group' and element_type 'e2m1' or 'e4m3'",
        ),
        ({"element_type": "int"}, "scale_type: 'e8m0' is for granularity 'group'"),
    ],
)
def test_types_that_do_not_go_together(changes, message):
    with pytest.raises(UserError, match=message):
        replace(MXFP4, **changes)


def test_schemes_are_the_formats():
    """The definitions, field by field."""
    float4 = {"bits": 4, "symmetric": True, "granularity": "group", "element_type": "e2m1"}
    nvfp4 = QuantSpec(**float4, group_size=16, scale_type="e4m3")
    mxfp4 = QuantSpec(**float4, group_size=32, scale_type="e8m0")
    assert TABLE["nvfp4"].weight == TABLE["nvfp4"].activation == nvfp4
    assert TABLE["mxfp4"].weight == TABLE["mxfp4"].activation == mxfp4
    mxfp8 = replace(mxfp4, bits=8, element_type="e4m3")
    assert TABLE["mxfp8"].weight == TABLE["mxfp8"].activation == mxfp8
    fp8 = QuantSpec(bits=8, symmetric=True, element_type="e4m3")
    assert TABLE["fp8-static"].weight == TABLE["fp8-static"].activation == fp8
    assert TABLE["fp8-dynamic"].weight == replace(fp8, granularity="channel")
    assert TABLE["fp8-dynamic"].activation == replace(fp8, granularity="token")
