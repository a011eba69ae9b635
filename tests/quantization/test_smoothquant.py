"""Smoothed models compute the same function, and their channels follow equation 4."""

from __future__ import annotations

import copy

import pytest
import torch

from float64_mode import IDS, float64_logits, native_model, perturbed
from oasis_attn.errors import UserError
from oasis_attn.modeling.families import FAMILIES
from oasis_attn.quantization.linear import transform_input
from oasis_attn.quantization.smoothquant import smooth
from tiny_models import tiny_config, tiny_model

LAYER = "model.layers.1."
pytestmark = pytest.mark.filterwarnings("ignore:null_attention falls back")


def smoothed(model, alpha=0.5, batches=(IDS,)):
    smoothed_model = copy.deepcopy(model)
    transforms = smooth(smoothed_model, batches, alpha=alpha)
    for name, transform in transforms.items():
        transform_input(smoothed_model.get_submodule(name), transform)
    return smoothed_model, set(transforms)


def largest_inputs(model, names):
    """max|x| per input channel of each layer."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].abs().amax((0, 1))})
        )
        for name in names
    ]
    model.base_model(IDS)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_unchanged(family):
    model = native_model(family)
    smoothed_model, _ = smoothed(model)
    torch.testing.assert_close(
        float64_logits(smoothed_model), float64_logits(model), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(
    "variant", ["oasis", "gated_attention", "gated_elementwise", "official", "attn_residual_block"]
)
def test_a_variant_is_unchanged_and_everything_is_folded(variant):
    model = perturbed(tiny_model(variant, dtype=torch.float64))
    smoothed_model, online = smoothed(model)
    torch.testing.assert_close(
        float64_logits(smoothed_model), float64_logits(model), rtol=0, atol=1e-10
    )
    assert not online


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
@pytest.mark.parametrize("form", ["value_null", {"name": "key_value_null", "nulls": 2}], ids=str)
def test_a_null_with_a_value_is_unchanged(family, form):
    text = tiny_config(family, initializer_range=0.2, attention_output_bias=True)
    model = tiny_model("kv_null", text=text, token_normalizer=form, dtype=torch.float64)
    model = perturbed(model)
    smoothed_model, online = smoothed(model)
    torch.testing.assert_close(
        float64_logits(smoothed_model), float64_logits(model), rtol=0, atol=1e-10
    )
    assert not online


@pytest.mark.parametrize(
    ("family", "online"),
    [
        ("llama", set()),
        ("phi3", set()),
        ("gemma2", set()),
        ("arcee", {"mlp.down_proj"}),
        ("nemotron", {*(f"self_attn.{x}_proj" for x in "qkv"), "mlp.up_proj", "mlp.down_proj"}),
        ("olmo2", {*(f"self_attn.{x}_proj" for x in "qkv"), "mlp.gate_proj", "mlp.up_proj"}),
    ],
)
def test_which_divisions_are_not_folded(family, online):
    model = native_model(family)
    _, found = smoothed(model)
    assert not smooth(model, [IDS], alpha=0.5, layers=set())
    found = {name.removeprefix(LAYER) for name in found if name.startswith(LAYER)}
    assert found == online


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "starcoder2"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_channels_follow_equation_4(family, alpha):
    """For a single linear layer, max|x| becomes max|x|^(1 - alpha) max|W|^(1 - alpha)."""
    model = native_model(family)
    name = "model.layers.0.mlp." + ("down_proj" if family == "llama" else "c_proj")
    smoothed_model, _ = smoothed(model, alpha)
    inputs = largest_inputs(model, [name])[name]
    columns = model.get_submodule(name).weight.abs().amax(0)
    expected = (inputs * columns) ** (1 - alpha)
    torch.testing.assert_close(largest_inputs(smoothed_model, [name])[name], expected)


def test_readers_of_a_norm_share_their_scale():
    model = native_model("llama")
    names = [f"{LAYER}self_attn.{x}_proj" for x in "qk"]  # v also changes with the smoothing of o
    smoothed_model, _ = smoothed(model, 1.0)
    found = largest_inputs(smoothed_model, names)
    for name in names:
        torch.testing.assert_close(found[name], torch.ones_like(found[name]))
        ratio = smoothed_model.get_submodule(name).weight / model.get_submodule(name).weight
        torch.testing.assert_close(ratio, largest_inputs(model, names)[name].expand_as(ratio))


@torch.no_grad()
def test_zero_channels_keep_their_scale():
    model = native_model("llama")
    model.model.layers[1].mlp.up_proj.weight[3] = 0
    smoothed_model, _ = smoothed(model)
    name = f"{LAYER}mlp.down_proj"
    before, after = (m.get_submodule(name).weight[:, 3] for m in (model, smoothed_model))
    assert torch.equal(before, after)
    assert all(p.isfinite().all() for p in smoothed_model.parameters())


def test_parameters_are_replaced_not_overwritten():
    model = native_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    smooth(shared, [IDS], alpha=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), True])
def test_alpha_outside_its_range(alpha):
    with pytest.raises(UserError, match=r"smooth_alpha: .* is not a number from 0 to 1"):
        smooth(native_model("llama"), [IDS], alpha=alpha)


@torch.no_grad()
def test_activations_that_are_not_finite():
    model = native_model("llama")
    model.model.embed_tokens.weight[int(IDS[0, 0])] = torch.inf
    with pytest.raises(UserError, match=r"q_proj: its input holds NaN or infinity"):
        smooth(model, [IDS], alpha=0.5)
