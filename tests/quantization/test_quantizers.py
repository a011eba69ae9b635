"""The dynamic and the static quantiser as modules."""

from __future__ import annotations

import pytest
import torch

from oasis_attn.errors import UserError
from oasis_attn.quantization.grids import Grid
from oasis_attn.quantization.quantizers import DynamicQuantizer, StaticQuantizer, fake_quantize

GRID = Grid(bits=8, symmetric=False)


def test_dynamic_follows_each_input():
    grid = Grid(bits=4, symmetric=True, granularity="token")
    quantizer = DynamicQuantizer(grid)
    for scale in (1.0, 1000.0):
        x = torch.randn(2, 3, 8) * scale
        assert torch.equal(quantizer(x), fake_quantize(x, grid))


def test_static_passes_inputs_while_observing_then_holds_its_range():
    quantizer = StaticQuantizer(GRID)
    with quantizer.observing():
        for x in (torch.tensor([[-1.0, 0.3]]), torch.tensor([[0.1, 3.0]])):
            assert quantizer(x) is x
    assert quantizer.range == pytest.approx((-1.0, 3.0), abs=4 / 255)
    x = torch.tensor([-7.0, -0.5, 0.0, 2.2, 50.0])
    expected = torch.tensor([quantizer.range[0], -0.5, 0.0, 2.2, quantizer.range[1]])
    torch.testing.assert_close(quantizer(x), expected, rtol=0, atol=4 / 255 / 2 + 1e-6)


def test_static_range_travels_in_the_state_dict():
    source, target = StaticQuantizer(GRID), StaticQuantizer(GRID)
    with source.observing():
        source(torch.randn(100))
    target.load_state_dict(source.state_dict())
    x = torch.randn(50)
    assert torch.equal(source(x), target(x))


def test_static_without_calibration_gives_nan_not_numbers():
    assert StaticQuantizer(GRID)(torch.ones(3)).isnan().all()


def test_static_refuses_a_calibration_without_data():
    quantizer = StaticQuantizer(GRID, site="head.input")
    with pytest.raises(UserError, match=r"^head\.input: no value"), quantizer.observing():
        pass
    assert quantizer.scale.isnan().all()


@pytest.mark.parametrize("granularity", ["token", "channel"])
def test_static_is_per_tensor(granularity):
    with pytest.raises(UserError, match=f"granularity: '{granularity}' has no static range"):
        StaticQuantizer(Grid(bits=8, symmetric=True, granularity=granularity))


def test_unknown_estimator():
    with pytest.raises(UserError, match="did you mean 'minmax'"):
        StaticQuantizer(GRID, estimator="minmx")
    with pytest.raises(UserError, match="did you mean 'minmax'"):
        fake_quantize(torch.ones(2), GRID, estimator="minmx")
