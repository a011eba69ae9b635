"""GPTQ rounds to the grid, beats rounding to nearest, and equals the slow textbook form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from float64_mode import IDS, native_model
from oasis_attn.errors import UserError
from oasis_attn.quantization import QuantSpec, schemes
from oasis_attn.quantization.gptq import DAMPENING, gptq, round_weight, second_moments
from oasis_attn.quantization.linear import transform_input
from oasis_attn.quantization.primitives import QParams, fake_quantize, to_blocks
from oasis_attn.quantization.quantizers import fake_quantize_dynamic, observe_qparams
from oasis_attn.quantization.targets import linear_targets
from oasis_attn.quantization.transforms import Rotation
from tiny_models import tiny_model

SPECS = {
    "channel": QuantSpec(bits=4, symmetric=True, granularity="channel"),
    "tensor": QuantSpec(bits=4, symmetric=False),
    "group": QuantSpec(bits=3, symmetric=False, granularity="group", group_size=16),
    "nvfp4": schemes()["nvfp4"].weight,
}


def correlated(tokens, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(tokens, width, generator=generator) @ mixing * torch.rand(width) * 2


def textbook(weight, x, qparams, spec):
    """Round one column at a time; invert the remaining H each time (Optimal Brain Quantizer)."""
    weight, x = weight.double().clone(), x.double()
    hessian = 2 * x.T @ x
    hessian += DAMPENING * hessian.diagonal().diag()
    scale = qparams.scale.expand(to_blocks(weight, spec).shape).reshape(weight.shape)
    left = (hessian.diagonal() * scale.square().mean(0)).argsort(descending=True)
    while len(left):
        column, inverse = left[0], torch.linalg.inv(hessian[left][:, left])
        rounded = fake_quantize(to_blocks(weight, spec), qparams, spec.element_type)
        rounded = rounded.reshape(weight.shape)[:, column]
        error = (weight[:, column] - rounded) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0]
        weight[:, column] = rounded
        left = left[1:]
    return weight


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize(("out", "width"), [(5, 48), (7, 160)])
def test_equals_the_textbook_form(kind, out, width):
    x, spec = correlated(300, width).double(), SPECS[kind]
    weight = torch.randn(out, width, dtype=torch.float64)
    qparams = observe_qparams(weight, spec)
    found = round_weight(weight, second_moments(x), qparams, spec)
    torch.testing.assert_close(found, textbook(weight, x, qparams, spec), rtol=0, atol=1e-10)


def test_the_order_of_the_columns_does_not_matter():
    x, spec = correlated(300, 160).double(), SPECS["channel"]
    weight, shuffled = torch.randn(7, 160, dtype=torch.float64), torch.randperm(160)
    qparams = observe_qparams(weight, spec)
    found = round_weight(weight, second_moments(x), qparams, spec)
    other = round_weight(weight[:, shuffled], second_moments(x[:, shuffled]), qparams, spec)
    torch.testing.assert_close(other, found[:, shuffled], rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(list(SPECS)),
    out=st.integers(1, 9),
    groups=st.integers(1, 9),
    tokens=st.integers(1, 80),
    seed=st.integers(0, 99),
)
def test_result_is_on_the_grid(kind, out, groups, tokens, seed):
    spec, x = SPECS[kind], correlated(tokens, 16 * groups, seed)
    weight = torch.randn(out, 16 * groups, generator=torch.Generator().manual_seed(seed))
    qparams = observe_qparams(weight, spec)
    found = round_weight(weight, second_moments(x), qparams, spec)
    again = fake_quantize(to_blocks(found, spec), qparams, spec.element_type)
    assert torch.equal(again.view(found.shape), found)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beats_rounding_to_nearest(kind, dtype):
    x, spec = correlated(512, 256), SPECS[kind]
    weight = torch.randn(64, 256).to(dtype)
    found = round_weight(weight, second_moments(x), observe_qparams(weight, spec), spec)
    assert found.dtype == dtype
    errors = [
        ((rounded - weight).float() @ x.T).square().mean()
        for rounded in (found, fake_quantize_dynamic(weight, spec))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_the_scale_of_a_channel_does_not_matter():
    """With the dampening of the paper, a massive channel would suppress all corrections."""
    x, spec = (
        correlated(512, 64).double(),
        QuantSpec(bits=4, symmetric=True, granularity="group", group_size=1),
    )
    weight = torch.randn(8, 64, dtype=torch.float64)
    found = {}
    for size in (1.0, 1e4):
        units = torch.ones(64, dtype=torch.float64)
        units[5] = size
        steps = (0.3 / units).expand(8, 64).unsqueeze(-1)
        qparams = QParams(steps, torch.full_like(steps, -8), torch.full_like(steps, 7))
        found[size] = round_weight(weight / units, second_moments(x * units), qparams, spec) * units
    torch.testing.assert_close(found[1e4], found[1.0])
    assert (found[1.0] - weight).abs().max() > 0.2  # not everything is rounded to nearest


@pytest.mark.parametrize("silent", [slice(3, 4), slice(None)])
def test_inputs_that_are_always_zero_are_rounded_to_nearest(silent):
    x, spec = correlated(100, 32), SPECS["channel"]
    x[:, silent] = 0
    weight = torch.randn(6, 32)
    found = round_weight(weight, second_moments(x), observe_qparams(weight, spec), spec)
    assert torch.equal(found[:, silent], fake_quantize_dynamic(weight, spec)[:, silent])


@torch.no_grad()
@pytest.mark.parametrize("variant", ["vanilla", "oasis"])
def test_a_model_layer_by_layer(variant):
    """Each layer is rounded for the input that the rounded earlier layers compute."""
    model, spec = tiny_model(variant), SPECS["channel"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = linear_targets(model, head=True)
    batches = [IDS, IDS.flip(1)]
    found = gptq(model, batches, names, spec)
    assert list(found) == list(names)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())

    inputs = {}
    qparams = {name: observe_qparams(before[f"{name}.weight"], spec) for name in names}
    for name in names:
        layer = model.get_submodule(name)
        layer.weight = torch.nn.Parameter(found[name])
        layer.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0]}))
    model(torch.cat(batches))
    for name in names:
        weight, x = before[f"{name}.weight"], inputs[name].flatten(0, 1)
        expected = round_weight(weight, second_moments(x), qparams[name], spec)
        # An entry half way between two codes may be rounded in either direction.
        assert (expected == found[name]).float().mean() > 0.99, name


@torch.no_grad()
def test_uses_transformed_inputs():
    model, name, spec = tiny_model("vanilla"), "model.layers.0.mlp.down_proj", SPECS["channel"]
    layer = model.get_submodule(name)
    inputs = []
    transform_input(layer, Rotation(layer.in_features).float())
    hook = layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    found = gptq(model, [IDS], [name], spec)[name]
    hook.remove()
    moments = second_moments(inputs[0].flatten(0, 1))
    expected = round_weight(layer.weight, moments, observe_qparams(layer.weight, spec), spec)
    assert torch.equal(found, expected)


def test_refuses_bad_input():
    model, spec = tiny_model("vanilla"), SPECS["channel"]
    names = ["model.layers.0.mlp.down_proj"]
    with pytest.raises(UserError, match=r"batches of lengths \[5, 12\]"):
        gptq(model, [IDS, IDS[:, :5]], names, spec)
    with pytest.raises(UserError, match=r"batches of lengths \[\]"):
        gptq(model, [], names, spec)
    layer = model.get_submodule(names[0])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"down_proj: its input holds NaN"):
        gptq(model, [IDS], names, spec)
    assert not layer._forward_pre_hooks


def test_a_layer_without_tokens_is_refused():
    model = native_model("llama").float()
    model.model.layers[3].extra = torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"layers.3.extra: no calibration token reached it"):
        gptq(model, [IDS], ["model.layers.3.extra"], SPECS["channel"])
