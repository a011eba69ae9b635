"""Observers against numpy and against an exhaustive search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oasis_attn.errors import UserError
from oasis_attn.quantization.observers import OBSERVERS, MinMaxObserver, MSEObserver
from oasis_attn.quantization.primitives import compute_qparams, fake_quantize
from oasis_attn.quantization.spec import QuantSpec

SPEC = QuantSpec(bits=8, symmetric=False)
ROWS = QuantSpec(bits=4, symmetric=True, granularity="channel")


def observe(name, batches, spec=SPEC):
    observer = OBSERVERS[name](spec, "x")
    for batch in batches:
        observer.update(batch)
    return observer.range()


@pytest.fixture
def batches():
    torch.manual_seed(0)
    return [torch.randn(3, 40, 25) * k for k in (1.0, 3.0, 2.0)]


def test_minmax_covers_all_batches(batches):
    low, high = observe("minmax", batches)
    everything = torch.stack(batches)
    assert (low.item(), high.item()) == (everything.min().item(), everything.max().item())


def test_running_minmax_is_an_exponential_mean(batches):
    low, high = observe("running_minmax", batches)
    a, b, c = (float(x.max()) for x in batches)
    assert high.item() == pytest.approx(0.9 * (0.9 * a + 0.1 * b) + 0.1 * c)
    a, b, c = (float(x.min()) for x in batches)
    assert low.item() == pytest.approx(0.9 * (0.9 * a + 0.1 * b) + 0.1 * c)


def test_percentile_equals_numpy(batches):
    low, high = observe("percentile", batches[:1])
    values = batches[0].double().numpy()
    assert low.item() == pytest.approx(np.percentile(values, 100 - 99.999), rel=1e-6)
    assert high.item() == pytest.approx(np.percentile(values, 99.999), rel=1e-6)


def test_percentile_of_a_single_value():
    low, high = observe("percentile", [torch.tensor([2.5])])
    assert (low.item(), high.item()) == (2.5, 2.5)


def error(x, spec, low, high):
    return (fake_quantize(x, compute_qparams(low, high, spec)) - x).square().sum(-1, keepdim=True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_no_worse_than_any_threshold(symmetric):
    torch.manual_seed(1)
    x = torch.randn(6, 1000)
    x[:3, 0] = 9.0
    spec = QuantSpec(bits=4, symmetric=symmetric, granularity="channel")
    low, high = observe("mse", [x], spec)
    chosen = error(x, spec, low, high)
    assert (chosen <= error(x, spec, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))).all()
    fine = torch.stack(
        [
            error(
                x,
                spec,
                x.amin(-1, keepdim=True).clamp(min=-t),
                x.amax(-1, keepdim=True).clamp(max=t),
            )
            for t in torch.linspace(0.05, 9.0, 200).tolist()
        ]
    ).amin(0)
    assert (chosen <= 1.05 * fine).all()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_mse_in_float16_is_that_in_float32(size):
    """Though squares of float16 numbers overflow, or vanish."""
    x = (torch.randn(2000) * size).half()
    spec = QuantSpec(bits=4, symmetric=False)
    low, high = observe("mse", [x.float()], spec)
    assert observe("mse", [x], spec) == (low.half(), high.half())


def test_mse_of_several_batches_equals_that_of_one():
    torch.manual_seed(2)
    parts = torch.randn(4, 1000).unbind()
    apart = observe("mse", parts, QuantSpec(bits=4, symmetric=False))
    together = observe("mse", [torch.cat(parts)], QuantSpec(bits=4, symmetric=False))
    assert apart == together


def test_mse_of_a_sample_is_close_to_that_of_the_batch():
    torch.manual_seed(3)
    x = torch.randn(300_000)
    x[::50_000] = 80.0
    spec = QuantSpec(bits=4, symmetric=False)

    class Whole(MSEObserver):
        sample = 10**9

    whole = Whole(spec)
    whole.update(x)
    sampled, exact = error(x, spec, *observe("mse", [x], spec)), error(x, spec, *whole.range())
    assert sampled.item() <= 1.02 * exact.item()


def masked_probabilities() -> torch.Tensor:
    scores = torch.randn(12, 64, 64).masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf)
    return scores.mul(2).softmax(-1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "data",
    [
        lambda: (torch.randn(64, 512) - 2).relu(),  # mostly equal values at the lower end
        lambda: (torch.randn(64, 512) - 2).relu().square(),
        masked_probabilities,
        lambda: (
            torch.randn(64, 576) * (1 + 7 * (torch.arange(576) % 36 == 0))
        ),  # few large channels
    ],
    ids=["relu", "relu-squared", "probabilities", "channels"],
)
def test_mse_of_a_long_batch_is_no_worse_than_minmax(data, bits):
    torch.manual_seed(4)
    x, spec = data().flatten(), QuantSpec(bits=bits, symmetric=False)
    chosen, widest = (error(x, spec, *observe(name, [x], spec)) for name in ("mse", "minmax"))
    assert chosen <= 1.02 * widest  # error of the sample


@pytest.mark.parametrize("name", OBSERVERS)
def test_one_range_per_block(name):
    low, high = observe(name, [torch.randn(5, 12)], ROWS)
    assert low.shape == high.shape == (5, 1)
    assert (low < high).all()


@pytest.mark.parametrize("name", OBSERVERS)
def test_empty_batches_have_no_effect(name):
    x = torch.tensor([1.0, -2.0])
    assert observe(name, [x[:0], x, x[:0]]) == observe(name, [x])


@pytest.mark.parametrize("name", OBSERVERS)
def test_missing_and_non_finite_data_are_refused(name):
    with pytest.raises(UserError, match="x: no value reached it"):
        observe(name, [torch.empty(0)])
    for bad in (torch.inf, -torch.inf, torch.nan):
        with pytest.raises(UserError, match="x: holds NaN or infinity"):
            observe(name, [torch.tensor([0.0, bad, 1.0])])


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_do_not_alias_their_input(name):
    x = torch.randn(100)
    observer = OBSERVERS[name](SPEC)
    observer.update(x)
    before = observer.range()
    x.zero_()
    assert observer.range() == before


def test_messages_name_the_tensor():
    with pytest.raises(UserError, match=r"^mlp\.up_proj: "):
        MinMaxObserver(SPEC, "mlp.up_proj").range()
