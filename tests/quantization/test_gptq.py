"""GPTQ: on the grid, better than nearest, the same as the textbook's slow form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from double import IDS, native_model
from oasis_attn.errors import UserError
from oasis_attn.quantization import Grid
from oasis_attn.quantization.gptq import DAMPENING, gptq, inverse_factor, round_weight
from oasis_attn.quantization.grids import Levels, snap, to_blocks
from oasis_attn.quantization.linear import transform_input
from oasis_attn.quantization.quantizers import fake_quantize, find_levels
from oasis_attn.quantization.sites import linear_sites
from oasis_attn.quantization.transforms import Rotation
from tiny import tiny_model

GRIDS = {
    "channel": Grid(bits=4, symmetric=True, granularity="channel"),
    "tensor": Grid(bits=4, symmetric=False),
    "group": Grid(bits=3, symmetric=False, granularity="group", group_size=16),
}


def correlated(tokens, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(tokens, width, generator=generator) @ mixing * torch.rand(width) * 2


def textbook(weight, x, levels, grid):
    """One column at a time, H^-1 of those left found anew each time (Optimal Brain Quantizer)."""
    weight, x = weight.double().clone(), x.double()
    hessian = 2 * x.T @ x
    hessian += DAMPENING * hessian.diagonal().diag()
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        rounded = snap(to_blocks(weight, grid), levels).reshape(weight.shape)[:, column]
        error = (weight[:, column] - rounded) / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0]
        weight[:, column] = rounded
    return weight


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize(("out", "width"), [(5, 48), (7, 160)])
def test_is_the_textbook_form(kind, out, width):
    x, grid = correlated(300, width).double(), GRIDS[kind]
    weight = torch.randn(out, width, dtype=torch.float64)
    levels = find_levels(weight, grid)
    found = round_weight(weight, inverse_factor(x), levels, grid)
    torch.testing.assert_close(found, textbook(weight, x, levels, grid), rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(list(GRIDS)),
    out=st.integers(1, 9),
    groups=st.integers(1, 9),
    tokens=st.integers(1, 80),
    seed=st.integers(0, 99),
)
def test_lies_on_the_grid(kind, out, groups, tokens, seed):
    grid, x = GRIDS[kind], correlated(tokens, 16 * groups, seed)
    weight = torch.randn(out, 16 * groups, generator=torch.Generator().manual_seed(seed))
    levels = find_levels(weight, grid)
    found = round_weight(weight, inverse_factor(x), levels, grid)
    assert torch.equal(snap(to_blocks(found, grid), levels).view(found.shape), found)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beats_rounding_to_nearest(kind, dtype):
    x, grid = correlated(512, 256), GRIDS[kind]
    weight = torch.randn(64, 256).to(dtype)
    found = round_weight(weight, inverse_factor(x), find_levels(weight, grid), grid)
    assert found.dtype == dtype
    errors = [
        ((rounded - weight).float() @ x.T).square().mean()
        for rounded in (found, fake_quantize(weight, grid))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_the_units_of_a_channel_do_not_matter():
    """With the paper's own dampening a massive channel would take all correction from the rest."""
    x, grid = (
        correlated(512, 64).double(),
        Grid(bits=4, symmetric=True, granularity="group", group_size=1),
    )
    weight = torch.randn(8, 64, dtype=torch.float64)
    found = {}
    for size in (1.0, 1e4):
        units = torch.ones(64, dtype=torch.float64)
        units[5] = size
        steps = (0.3 / units).expand(8, 64).unsqueeze(-1)
        levels = Levels(steps, torch.full_like(steps, -8), torch.full_like(steps, 7))
        found[size] = round_weight(weight / units, inverse_factor(x * units), levels, grid) * units
    torch.testing.assert_close(found[1e4], found[1.0])
    assert (found[1.0] - weight).abs().max() > 0.2  # not all are at their nearest level


@pytest.mark.parametrize("silent", [slice(3, 4), slice(None)])
def test_inputs_that_are_always_zero_are_rounded_to_nearest(silent):
    x, grid = correlated(100, 32), GRIDS["channel"]
    x[:, silent] = 0
    weight = torch.randn(6, 32)
    found = round_weight(weight, inverse_factor(x), find_levels(weight, grid), grid)
    assert torch.equal(found[:, silent], fake_quantize(weight, grid)[:, silent])


@torch.no_grad()
@pytest.mark.parametrize("variant", ["vanilla", "oasis"])
def test_a_model_layer_by_layer(variant):
    """Each layer is rounded for the input that rounded layers before it give."""
    model, grid = tiny_model(variant), GRIDS["channel"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = linear_sites(model, head=True)
    batches = [IDS, IDS.flip(1)]
    found = gptq(model, batches, names, grid)
    assert list(found) == list(names)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())

    inputs = {}
    levels = {name: find_levels(before[f"{name}.weight"], grid) for name in names}
    for name in names:
        layer = model.get_submodule(name)
        layer.weight = torch.nn.Parameter(found[name])
        layer.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0]}))
    model(torch.cat(batches))
    for name in names:
        weight, x = before[f"{name}.weight"], inputs[name].flatten(0, 1)
        expected = round_weight(weight, inverse_factor(x), levels[name], grid)
        # An entry between two levels may fall to either side.
        assert (expected == found[name]).float().mean() > 0.99, name


@torch.no_grad()
def test_sees_inputs_as_they_are_transformed():
    model, name, grid = tiny_model("vanilla"), "model.layers.0.mlp.down_proj", GRIDS["channel"]
    layer = model.get_submodule(name)
    inputs = []
    transform_input(layer, Rotation(layer.in_features).float())
    hook = layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    found = gptq(model, [IDS], [name], grid)[name]
    hook.remove()
    factor = inverse_factor(inputs[0].flatten(0, 1))
    expected = round_weight(layer.weight, factor, find_levels(layer.weight, grid), grid)
    assert torch.equal(found, expected)


def test_refuses_what_it_cannot_do():
    model, grid = tiny_model("vanilla"), GRIDS["channel"]
    names = ["model.layers.0.mlp.down_proj"]
    with pytest.raises(UserError, match=r"batches of lengths \[5, 12\]"):
        gptq(model, [IDS, IDS[:, :5]], names, grid)
    with pytest.raises(UserError, match=r"batches of lengths \[\]"):
        gptq(model, [], names, grid)
    layer = model.get_submodule(names[0])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"down_proj: its input holds NaN"):
        gptq(model, [IDS], names, grid)
    assert not layer._forward_pre_hooks


def test_a_layer_that_no_token_reaches():
    model = native_model("llama").float()
    model.model.layers[3].extra = torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"layers.3.extra: no calibration token reached it"):
        gptq(model, [IDS], ["model.layers.3.extra"], GRIDS["channel"])
