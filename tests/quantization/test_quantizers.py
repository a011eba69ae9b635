"""The dynamic and the static quantizer."""

from __future__ import annotations

import pytest
import torch

from oasis_attn.errors import UserError
from oasis_attn.quantization.quantizers import (
    DynamicQuantizer,
    StaticQuantizer,
    fake_quantize_dynamic,
)
from oasis_attn.quantization.spec import QuantSpec

SPEC = QuantSpec(bits=8, symmetric=False)


def test_dynamic_uses_the_range_of_each_input():
    spec = QuantSpec(bits=4, symmetric=True, granularity="token")
    quantizer = DynamicQuantizer(spec)
    for scale in (1.0, 1000.0):
        x = torch.randn(2, 3, 8) * scale
        assert torch.equal(quantizer(x), fake_quantize_dynamic(x, spec))


def test_static_passes_inputs_while_calibrating_and_then_uses_a_fixed_range():
    quantizer = StaticQuantizer(SPEC)
    with quantizer.calibrating():
        for x in (torch.tensor([[-1.0, 0.3]]), torch.tensor([[0.1, 3.0]])):
            assert quantizer(x) is x
    assert quantizer.range == pytest.approx((-1.0, 3.0), abs=4 / 255)
    x = torch.tensor([-7.0, -0.5, 0.0, 2.2, 50.0])
    expected = torch.tensor([quantizer.range[0], -0.5, 0.0, 2.2, quantizer.range[1]])
    torch.testing.assert_close(quantizer(x), expected, rtol=0, atol=4 / 255 / 2 + 1e-6)


def test_static_range_is_in_the_state_dict():
    source, target = StaticQuantizer(SPEC), StaticQuantizer(SPEC)
    with source.calibrating():
        source(torch.randn(100))
    target.load_state_dict(source.state_dict())
    x = torch.randn(50)
    assert torch.equal(source(x), target(x))


def test_static_without_calibration_gives_nan_not_numbers():
    assert StaticQuantizer(SPEC)(torch.ones(3)).isnan().all()


def test_static_refuses_a_calibration_without_data():
    quantizer = StaticQuantizer(SPEC, name="head.input")
    with pytest.raises(UserError, match=r"^head\.input: no value"), quantizer.calibrating():
        pass
    assert quantizer.scale.isnan().all()


@pytest.mark.parametrize("granularity", ["token", "channel"])
def test_static_is_per_tensor(granularity):
    with pytest.raises(UserError, match=f"granularity: '{granularity}' has no static range"):
        StaticQuantizer(QuantSpec(bits=8, symmetric=True, granularity=granularity))


def test_unknown_observer():
    with pytest.raises(UserError, match="did you mean 'minmax'"):
        StaticQuantizer(SPEC, observer="minmx")
    with pytest.raises(UserError, match="did you mean 'minmax'"):
        fake_quantize_dynamic(torch.ones(2), SPEC, observer="minmx")


def test_dynamic_ranges_can_be_clipped():
    spec = QuantSpec(bits=8, symmetric=False, granularity="token")
    x = torch.linspace(-1, 3, 401).expand(2, -1) * torch.tensor([[1.0], [10.0]])
    found = DynamicQuantizer(spec, clip_ratio=0.5)(x)
    step = 2.0 / 255
    inside = x[0].clamp(-0.5, 1.5)
    torch.testing.assert_close(found[0], inside, rtol=0, atol=1.01 * step)
    torch.testing.assert_close(found[1], 10 * found[0])
