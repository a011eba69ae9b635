"""Fitted transforms compute the same function with the smallest error of quantization."""

from __future__ import annotations

import copy

import pytest
import torch

from float64_mode import IDS, float64_logits, native_model
from oasis_attn.errors import UserError
from oasis_attn.modeling.families import FAMILIES
from oasis_attn.quantization.fitted import dampened, directions, fit_inputs, fit_transform
from oasis_attn.quantization.linear import transform_input
from oasis_attn.quantization.quantizers import fake_quantize_dynamic
from oasis_attn.quantization.schemes import schemes
from oasis_attn.quantization.targets import linear_layers
from oasis_attn.quantization.transforms import Rotation
from tiny_models import tiny_model

W4A4 = schemes()["w4a4"]
pytestmark = pytest.mark.filterwarnings("ignore:null_attention falls back")


def fitted(model, seed=1):
    result = copy.deepcopy(model)
    for name, transform in fit_inputs(result, [IDS], seed=seed).items():
        transform_input(result.get_submodule(name), transform)
    return result


def check_same(model):
    expected = float64_logits(model)
    torch.testing.assert_close(float64_logits(fitted(model)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_unchanged(family):
    narrow = {"intermediate_size_mlp": 48} if family == "llama4_text" else {}
    check_same(native_model(family, **narrow))


@pytest.mark.parametrize("variant", ["oasis", "vanilla"])
def test_a_variant_is_unchanged(variant):
    check_same(tiny_model(variant, dtype=torch.float64))


def anisotropic(tokens, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, width, dtype=torch.float64)
    mixing = torch.linalg.qr(torch.randn(width, width, generator=generator).double()).Q
    return torch.randn(tokens, width, generator=generator).double() * scales @ mixing


def test_input_and_weight_get_the_same_even_second_moments():
    x, weight = anisotropic(500, 48), torch.randn(60, 48, dtype=torch.float64)
    weight *= torch.logspace(0, 1, 48)
    moments = directions(x, "x")
    transform, other = fit_transform(moments, weight, Rotation(48))
    torch.testing.assert_close(other @ transform.T, weight)
    found = transform.T @ dampened(moments) @ transform
    inverse = torch.linalg.inv(transform)
    torch.testing.assert_close(found, inverse @ dampened(weight.T @ weight) @ inverse.T)
    diagonal = found.diagonal()
    torch.testing.assert_close(diagonal, diagonal.mean().expand(48))


def test_no_other_transform_has_a_smaller_error_term():
    """tr(T^T S T) tr(T^-1 M T^-T), of which the expected error is a multiple."""
    x, weight = anisotropic(500, 24), torch.randn(30, 24, dtype=torch.float64)
    moments, second = directions(x, "x"), dampened(weight.T @ weight)

    def term(transform):
        inverse = torch.linalg.inv(transform)
        of_input = (transform.T @ dampened(moments) @ transform).trace()
        return float(of_input * (inverse @ second @ inverse.T).trace())

    transform, _ = fit_transform(moments, weight, Rotation(24))
    eye = torch.eye(24, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    others = [eye + 0.1 * torch.randn(24, 24, generator=generator) for _ in range(20)]
    least = term(transform)
    assert least < 0.5 * term(Rotation(24)(eye))
    assert all(term(transform @ other) > least for other in others)


def test_the_error_is_smaller_than_with_a_rotation():
    x, weight = anisotropic(500, 64), torch.randn(40, 64, dtype=torch.float64)
    rotation = Rotation(64)
    errors = []
    for transform, other in (
        (rotation(torch.eye(64, dtype=torch.float64)), rotation(weight)),
        fit_transform(directions(x, "x"), weight, rotation),
    ):
        rounded = fake_quantize_dynamic(x @ transform, W4A4.activation)
        y = rounded @ fake_quantize_dynamic(other, W4A4.weight).T
        errors.append((y - x @ weight.T).square().mean())
    assert errors[1] < 0.5 * errors[0]


@torch.no_grad()
def test_which_layers_are_fitted_and_that_the_seed_decides():
    model = tiny_model("oasis")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    first, second, other = (
        fit_inputs(copy.deepcopy(model), [IDS], seed=seed) for seed in (1, 1, 2)
    )
    assert list(first) == list(linear_layers(model))
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(first[name].matrix, second[name].matrix)
    assert not torch.equal(first[name].matrix, other[name].matrix)
    shared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    fit_inputs(shared, [IDS], seed=1)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_unusable_calibration_data_is_refused():
    model = tiny_model("vanilla")
    with pytest.raises(UserError, match=r"batches of lengths \[5, 12\]"):
        fit_inputs(model, [IDS, IDS[:, :5]], seed=0)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"down_proj: its input holds NaN"):
        fit_inputs(model, [IDS], seed=0)
    assert not any(module._forward_pre_hooks for module in model.modules())
