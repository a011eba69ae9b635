"""Range estimators against numpy and against an exhaustive search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oasis_attn.errors import UserError
from oasis_attn.quantization.grids import Grid, place, snap
from oasis_attn.quantization.ranges import ESTIMATORS, LeastSquares, MinMax

GRID = Grid(bits=8, symmetric=False)
ROWS = Grid(bits=4, symmetric=True, granularity="channel")


def estimate(name, batches, grid=GRID):
    estimator = ESTIMATORS[name](grid, "x")
    for batch in batches:
        estimator.update(batch)
    return estimator.range()


@pytest.fixture
def batches():
    torch.manual_seed(0)
    return [torch.randn(3, 40, 25) * k for k in (1.0, 3.0, 2.0)]


def test_minmax_is_of_all_batches(batches):
    low, high = estimate("minmax", batches)
    everything = torch.stack(batches)
    assert (low.item(), high.item()) == (everything.min().item(), everything.max().item())


def test_running_minmax_is_an_exponential_mean(batches):
    low, high = estimate("running_minmax", batches)
    a, b, c = (float(x.max()) for x in batches)
    assert high.item() == pytest.approx(0.9 * (0.9 * a + 0.1 * b) + 0.1 * c)
    a, b, c = (float(x.min()) for x in batches)
    assert low.item() == pytest.approx(0.9 * (0.9 * a + 0.1 * b) + 0.1 * c)


def test_percentile_is_numpys(batches):
    low, high = estimate("percentile", batches[:1])
    values = batches[0].double().numpy()
    assert low.item() == pytest.approx(np.percentile(values, 100 - 99.999), rel=1e-6)
    assert high.item() == pytest.approx(np.percentile(values, 99.999), rel=1e-6)


def test_percentile_of_a_single_value():
    low, high = estimate("percentile", [torch.tensor([2.5])])
    assert (low.item(), high.item()) == (2.5, 2.5)


def error(x, grid, low, high):
    return (snap(x, place(low, high, grid)) - x).square().sum(-1, keepdim=True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_no_worse_than_any_threshold(symmetric):
    torch.manual_seed(1)
    x = torch.randn(6, 1000)
    x[:3, 0] = 9.0
    grid = Grid(bits=4, symmetric=symmetric, granularity="channel")
    low, high = estimate("mse", [x], grid)
    chosen = error(x, grid, low, high)
    assert (chosen <= error(x, grid, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))).all()
    fine = torch.stack(
        [
            error(
                x,
                grid,
                x.amin(-1, keepdim=True).clamp(min=-t),
                x.amax(-1, keepdim=True).clamp(max=t),
            )
            for t in torch.linspace(0.05, 9.0, 200).tolist()
        ]
    ).amin(0)
    assert (chosen <= 1.05 * fine).all()


def test_mse_sums_over_batches_as_over_one():
    torch.manual_seed(2)
    parts = torch.randn(4, 1000).unbind()
    apart = estimate("mse", parts, Grid(bits=4, symmetric=False))
    together = estimate("mse", [torch.cat(parts)], Grid(bits=4, symmetric=False))
    assert apart == together


def test_mse_sample_stands_in_for_a_long_batch():
    torch.manual_seed(3)
    x = torch.randn(300_000)
    x[::50_000] = 80.0
    grid = Grid(bits=4, symmetric=False)

    class Whole(LeastSquares):
        sample = 10**9

    whole = Whole(grid)
    whole.update(x)
    sampled, exact = error(x, grid, *estimate("mse", [x], grid)), error(x, grid, *whole.range())
    assert sampled.item() <= 1.02 * exact.item()


def masked_probabilities() -> torch.Tensor:
    scores = torch.randn(12, 64, 64).masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf)
    return scores.mul(2).softmax(-1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "data",
    [
        lambda: (torch.randn(64, 512) - 2).relu(),  # mostly ties, at the lower end
        lambda: (torch.randn(64, 512) - 2).relu().square(),
        masked_probabilities,
        lambda: torch.randn(64, 576) * (1 + 7 * (torch.arange(576) % 36 == 0)),  # in few channels
    ],
    ids=["relu", "relu-squared", "probabilities", "channels"],
)
def test_mse_of_a_long_batch_is_no_worse_than_minmax(data, bits):
    torch.manual_seed(4)
    x, grid = data().flatten(), Grid(bits=bits, symmetric=False)
    chosen, widest = (error(x, grid, *estimate(name, [x], grid)) for name in ("mse", "minmax"))
    assert chosen <= 1.02 * widest  # what the sample may be wrong by


@pytest.mark.parametrize("name", ESTIMATORS)
def test_all_give_one_range_per_block(name):
    low, high = estimate(name, [torch.randn(5, 12)], ROWS)
    assert low.shape == high.shape == (5, 1)
    assert (low < high).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_empty_batches_say_nothing(name):
    x = torch.tensor([1.0, -2.0])
    assert estimate(name, [x[:0], x, x[:0]]) == estimate(name, [x])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_refuse_no_data_and_non_finite_data(name):
    with pytest.raises(UserError, match="x: no value reached it"):
        estimate(name, [torch.empty(0)])
    for bad in (torch.inf, -torch.inf, torch.nan):
        with pytest.raises(UserError, match="x: holds NaN or infinity"):
            estimate(name, [torch.tensor([0.0, bad, 1.0])])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_keep_no_hold_of_their_input(name):
    x = torch.randn(100)
    estimator = ESTIMATORS[name](GRID)
    estimator.update(x)
    before = estimator.range()
    x.zero_()
    assert estimator.range() == before


def test_site_is_named():
    with pytest.raises(UserError, match=r"^mlp\.up_proj: "):
        MinMax(GRID, "mlp.up_proj").range()
