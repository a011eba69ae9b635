"""Rotated models compute the same function; models that cannot be rotated are refused."""

from __future__ import annotations

import copy
import importlib
import math
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from float64_mode import IDS, float64_logits, native_model, perturbed
from oasis_attn.errors import UserError
from oasis_attn.modeling.extensions import BRANCH_NORMS
from oasis_attn.modeling.families import FAMILIES
from oasis_attn.modeling.variants import variants
from oasis_attn.quantization.hadamard import hadamard, is_order
from oasis_attn.quantization.linear import transform_input
from oasis_attn.quantization.rotation import rotate_inputs, rotate_residual, rotate_weights
from oasis_attn.quantization.schemes import get_scheme
from oasis_attn.quantization.simulate import quantize, scheme_targets, transformed_copy
from oasis_attn.quantization.transforms import Rotation
from tiny_models import tiny_config, tiny_model

ROTATES = {
    *("apertus", "arcee", "cwm", "ernie4_5", "gemma", "glm", "granite", "granite_swa", "helium"),
    *("hunyuan_v1_dense", "internlm3", "iquestcoder", "llama", "minicpm3", "ministral"),
    *("ministral3", "mistral", "nanochat", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3"),
    *("vaultgemma", "youtu"),
}
pytestmark = pytest.mark.filterwarnings("ignore:null_attention falls back")


def rotated(model, seed=1, way=rotate_residual):
    rotated_model = copy.deepcopy(model)
    for name, transform in (way(rotated_model, seed=seed) or {}).items():
        transform_input(rotated_model.get_submodule(name), transform)
    return rotated_model


def check_same(model, way=rotate_residual):
    rotated_model = rotated(model, way=way)
    torch.testing.assert_close(
        float64_logits(rotated_model), float64_logits(model), rtol=0, atol=1e-10
    )
    return rotated_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_unchanged_or_refused(family):
    model = native_model(family)
    if family in ROTATES:
        check_same(model)
        check_folded(model, latent=family in ("minicpm3", "youtu"))
        return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for way in (rotate_residual, rotate_weights):
        with pytest.raises(UserError, match=f"family '{family}' cannot be rotated: "):
            way(model, seed=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def check_folded(model, *, latent=False):
    """The modules and logits are the same; each value head is rotated, unless values are latent."""
    folded = check_same(model, rotate_weights)
    assert [*map(str, folded.modules())] == [*map(str, model.modules())]
    if not latent:
        before, after = values(model), values(folded)
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=0, atol=1e-10)
        assert ((after - before).abs().amax((0, 1)) > 1e-3).all()


def values(model):
    """The value heads [B, T, H, d] of the first layer."""
    found = []
    attention = model.base_model.layers[0].self_attn
    linear = getattr(attention, "v_proj", None) or attention.qkv_proj
    handle = linear.register_forward_hook(lambda _module, _args, output: found.append(output))
    float64_logits(model)
    handle.remove()
    heads = found[0].unflatten(-1, (-1, attention.head_dim))
    return heads[:, :, -2:]  # of a fused projection, the last ones


@pytest.mark.parametrize("family", FAMILIES)
def test_rotated_inputs_leave_every_family_unchanged(family):
    check_same(native_model(family), rotate_inputs)


def test_rotated_groups_keep_outliers_to_themselves():
    for model in (native_model("llama"), native_model("mixtral")):
        check_same(model, partial(rotate_inputs, group_size=8))
    spike = torch.zeros(3, 32, dtype=torch.float64)
    spike[:, 13] = 5
    expected = torch.zeros_like(spike)
    expected[:, 8:16] = 5 * 8**-0.5
    torch.testing.assert_close(Rotation(8)(spike).abs(), expected)


def test_a_layer_that_has_no_groups_is_refused_unless_it_is_left_out():
    model = native_model("llama", intermediate_size=40)
    scheme = get_scheme("mxfp4").with_options({"rotation": "groups"})
    with pytest.raises(UserError, match="group_size: 32 does not divide the 40 entries of model"):
        quantize(model, scheme)
    others = [name for name in scheme_targets(model, scheme) if "down_proj" not in name]
    layer = quantize(model, scheme, targets=others).model.layers[0]
    assert layer.mlp.up_proj.input_transform is not None
    assert not hasattr(layer.mlp.down_proj, "input_transform")


@pytest.mark.parametrize("rotation", ["hadamard", "inputs", "groups", "fitted"])
def test_layers_that_are_not_quantized_are_not_transformed(rotation):
    """Those that are keep the signs that they have if everything is quantized."""
    model = native_model("llama")
    groups = {"weight.group_size": 8, "activation.group_size": 8}
    scheme = get_scheme("mxfp4").with_options({"rotation": rotation, **groups})
    names = scheme_targets(model, scheme)
    left_out = ("0.self_attn.q_proj", "0.self_attn.o_proj", "1.mlp.down_proj")
    kept = [name for name in names if not name.endswith(left_out)]
    every, some = (transformed_copy(model, scheme, [IDS], each, 1) for each in (names, kept))
    torch.testing.assert_close(float64_logits(some), float64_logits(model), rtol=0, atol=1e-10)
    found = {name for name in names if hasattr(some.get_submodule(name), "input_transform")}
    assert found == {x for x in kept if hasattr(every.get_submodule(x), "input_transform")}
    if rotation == "fitted":  # the inputs of other layers differ in the last digits
        found = {"model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"}
    for name in found:
        before, after = (each.get_submodule(name).state_dict() for each in (every, some))
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("way", [rotate_residual, rotate_inputs])
def test_which_inputs_are_rotated_at_inference_time(way):
    model = tiny_model("oasis", output_gate="elementwise")
    names = set(way(model, seed=1))
    writers = ("self_attn.o_proj", "mlp.down_proj")
    readers = (*(f"self_attn.{x}_proj" for x in "qkv"), "mlp.gate_proj", "mlp.up_proj")
    expected = writers if way is rotate_residual else writers + readers
    assert names == {f"model.layers.{layer}.{name}" for layer in range(4) for name in expected}


@pytest.mark.parametrize("variant", [name for name in variants() if "shuffled" not in name])
def test_a_variant_is_unchanged(variant):
    model = perturbed(tiny_model(variant, dtype=torch.float64))
    check_same(model)
    check_same(model, rotate_weights)


def test_a_registered_branch_norm_is_refused_unless_inputs_are_rotated(monkeypatch):
    monkeypatch.setitem(BRANCH_NORMS._entries, "squash", lambda x_BTD, _kind: x_BTD.tanh())
    model = tiny_model("oasis", dtype=torch.float64, branch_norm="squash")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for way in (rotate_residual, rotate_weights):
        with pytest.raises(UserError, match=r"rotation: .* branch_norm 'squash', .* use 'inputs'"):
            way(model, seed=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    check_same(model, rotate_inputs)


@pytest.mark.parametrize(("gate", "kept"), [("elementwise", True), ("head", False)])
def test_values_with_a_gate_for_each_entry_are_not_rotated(gate, kept):
    model = perturbed(tiny_model("vanilla", dtype=torch.float64, output_gate=gate))
    before, after = values(model), values(check_same(model, rotate_weights))
    assert torch.allclose(after, before, rtol=0, atol=1e-10) == kept


def test_blocks_of_sources_biases_and_odd_widths():
    odd = {"hidden_size": 44, "intermediate_size": 52, "head_dim": 10}
    text = tiny_config("qwen2", initializer_range=0.2, **odd)
    model = perturbed(tiny_model("oasis", dtype=torch.float64, text=text, depth_block_size=3))
    check_same(model)
    check_same(model, rotate_weights)


def test_a_tied_head_is_untied_and_stays_so():
    model = native_model("llama", tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.clone()
    rotated_model = check_same(model)
    rotated_model.tie_weights()
    assert (
        rotated_model.get_output_embeddings().weight
        is not rotated_model.get_input_embeddings().weight
    )
    assert not rotated_model.config.tie_word_embeddings
    # Parameters were replaced, not overwritten.
    shared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    rotate_residual(shared, seed=1)
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_hidden_states_are_rotated_and_outliers_spread():
    model = native_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] += 100
    hidden, rotated_hidden = (
        m.model(IDS, output_hidden_states=True).hidden_states[1] for m in (model, rotated(model))
    )
    torch.testing.assert_close(rotated_hidden.norm(dim=-1), hidden.norm(dim=-1))
    assert hidden.abs().max() > 90
    assert rotated_hidden.abs().max() < 3 * 100 / math.sqrt(32)


def test_the_seed_determines_the_rotation():
    model = native_model("llama")
    first, second, other = (rotated(model, seed).model.embed_tokens.weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("n", [n for n in range(1, 130) if is_order(n)])
def test_hadamard_matrices(n):
    matrix = hadamard(n)
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("width", [256, 576, 1024, 1536])
def test_rotations_on_the_meta_device(width):
    """from_pretrained creates them there, and may be the first to import the module."""
    with torch.device("meta"):
        module = importlib.reload(sys.modules[hadamard.__module__])
        assert not module.hadamard(16).is_meta
        assert all(buffer.is_meta for buffer in Rotation(width).buffers())
    assert Rotation(width)(torch.ones(width, dtype=torch.float64)).isfinite().all()


def test_orders_without_a_construction():
    assert not any(is_order(n) for n in (3, 6, 10, 14, 92))
    with pytest.raises(ValueError, match="order 92"):
        hadamard(92)


@settings(deadline=None, max_examples=25)
@given(width=st.integers(1, 300), seed=st.integers(0, 99))
def test_rotations_are_orthogonal(width, seed):
    rotation = Rotation(width, generator=torch.Generator().manual_seed(seed))
    matrix = rotation(torch.eye(width, dtype=torch.float64))
    eye = torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [576, 1536, 4864, 14336])
def test_rotations_of_real_widths_are_even_and_cheap(width):
    rotation = Rotation(width)
    spike = torch.zeros(width, dtype=torch.float64)
    spike[7] = 1
    torch.testing.assert_close(rotation(spike).abs(), torch.full_like(spike, width**-0.5))
    assert len(rotation.left) + len(rotation.right) < 3 * math.sqrt(width)


def test_a_width_without_hadamard_pair_mixes_all_channels():
    assert str(Rotation(11008)) == "Rotation(43 x 256)"
    assert Rotation(11008)(torch.eye(11008, dtype=torch.float64)[:1]).abs().min() > 0
