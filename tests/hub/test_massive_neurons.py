"""Neurons that write massive activations are pruned where the loss permits it."""

from contextlib import ExitStack

import pytest
import torch

from float64_mode import IDS, Float64Mode, native_model
from oasis_attn import UserError
from oasis_attn.hub.massive_neurons import _mlps, _Outputs, prune_massive_neurons
from oasis_attn.hub.null_from_sink import null_from_sink
from oasis_attn.hub.token_peaks import activation_size, token_peaks

LAYER, UNIT = 1, 3


@pytest.fixture
def planted():
    """A model in which one neuron writes by far the largest activations."""
    model = native_model("llama")
    with torch.no_grad():
        model.model.layers[LAYER].mlp.down_proj.weight[2, UNIT] = 5000
    return model


@torch.no_grad()
def test_the_neuron_with_the_massive_output_is_pruned(planted, monkeypatch):
    monkeypatch.setattr("oasis_attn.hub.massive_neurons._LOSS", 100)
    projection, tried = planted.model.layers[LAYER].mlp.down_proj, []
    shared_DI = projection.weight
    before_DI = shared_DI.clone()
    with Float64Mode():
        silenced = projection.register_forward_pre_hook(lambda _module, args: without(args[0]))
        expected, size = planted(IDS).logits, activation_size(token_peaks(planted, IDS))
        silenced.remove()
        assert activation_size(token_peaks(planted, IDS)) > 2 * size
        found = prune_massive_neurons(planted, IDS, 1, on_try=lambda: tried.append(1))
        torch.testing.assert_close(planted(IDS).logits, expected, rtol=0, atol=1e-10)
    assert found == ((LAYER, UNIT),)
    assert len(tried) == 1
    assert torch.equal(shared_DI, before_DI)  # a model that shares it does not change
    assert projection.weight.requires_grad


def without(x_BTI):
    x_BTI = x_BTI.clone()
    x_BTI[..., UNIT] = 0
    return x_BTI


@torch.no_grad()
def test_no_neuron_is_pruned_that_the_model_needs(planted, monkeypatch):
    monkeypatch.setattr("oasis_attn.hub.massive_neurons._LOSS", -100)
    with Float64Mode():
        before = planted(IDS).logits
        assert prune_massive_neurons(planted, IDS, 1) == ()
        assert torch.equal(planted(IDS).logits, before)


@torch.no_grad()
def test_pruning_follows_the_nulls(planted, monkeypatch):
    monkeypatch.setattr("oasis_attn.hub.massive_neurons._LOSS", 100)
    with Float64Mode():
        found = null_from_sink(planted, IDS, prune_neurons=2)
    assert found.neurons[0] == (LAYER, UNIT)
    weights = [
        model.model.layers[LAYER].mlp.down_proj.weight[:, UNIT] for model in (found.model, planted)
    ]
    assert weights[0].eq(0).all()
    assert weights[1].ne(0).any()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2", "granite"])
def test_the_output_of_a_neuron_is_what_it_adds_to_the_residual_stream(family):
    model = native_model(family)
    layer, seen = model.model.layers[LAYER], []
    layer.mlp.down_proj.register_forward_hook(lambda _module, args, y: seen.append((args[0], y)))
    factor_D = torch.ones(32).double()
    if family == "granite":
        layer.residual_multiplier = factor_D = 0.22
    with Float64Mode(), ExitStack() as stack:
        outputs = _Outputs(_mlps(model)[LAYER], stack)
        model(IDS)
        ((x_BTI, y_BTD),) = seen
        if family in ("olmo2", "gemma2"):
            norm = layer.post_feedforward_layernorm
            gain_D = norm.weight if family == "olmo2" else 1 + norm.weight
            factor_D = gain_D / y_BTD.square().mean(-1, keepdim=True).sqrt()
        added_BTDI = x_BTI.unsqueeze(2) * layer.mlp.down_proj.weight
        added_BTDI = added_BTDI * torch.as_tensor(factor_D).unsqueeze(-1)
        expected_I = added_BTDI.abs().amax((0, 1, 2))
        torch.testing.assert_close(outputs.sizes_I(), expected_I, rtol=1e-4, atol=0)


@torch.no_grad()
def test_nothing_is_pruned_without_a_loss(planted):
    tried = []
    with Float64Mode():
        one_token = IDS.reshape(-1, 1)
        assert prune_massive_neurons(planted, one_token, 1, on_try=lambda: tried.append(1)) == ()
    assert not tried


@torch.no_grad()
def test_experts_have_no_neurons_to_prune():
    model = native_model("mixtral")
    with Float64Mode():
        assert prune_massive_neurons(model, IDS, 1) == ()


class Quantized(torch.Tensor):
    """Stands for the tensors with which torchao replaces weights of a plain `nn.Linear`."""


def test_a_weight_that_is_quantized_in_place(planted):
    projection = planted.model.layers[LAYER].mlp.down_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().as_subclass(Quantized))
    assert list(_mlps(planted)) == [0, 2, 3]
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight is a Quantized"):
        null_from_sink(planted, IDS)


def test_refusals():
    with pytest.raises(UserError, match=r"prune_neurons: 65 is not"):
        null_from_sink(native_model("llama"), IDS, prune_neurons=65)
