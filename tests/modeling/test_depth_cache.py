"""The depth state is beside the hidden states: layers look like any other layers from outside."""

import gc
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from oasis_attn import UserError
from oasis_attn.modeling.depth_cache import observe_depth
from oasis_attn.ops import c_kernels
from oasis_attn.ops.depth_mix import AutogradMixer, TwoPhaseMixer
from oasis_attn.ops.depth_mix.c_mixer import CMixer
from tiny_models import tiny_model

VARIANTS = ["oasis", "oasis_block", "attn_residual", "official", "oasis_depth_sigmoid", "vanilla"]


@pytest.fixture
def mixes(monkeypatch):
    """The class of the mixer that ran, one entry per router."""
    ran = []
    for mixer in (AutogradMixer, CMixer, TwoPhaseMixer):

        def counted(self, *args, mixer=mixer, update=mixer.update, **keywords):
            ran.append(mixer.__name__)
            return update(self, *args, **keywords)

        monkeypatch.setattr(mixer, "update", counted)
    return ran


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_take_and_return_hidden_states(variant, ids):
    model, seen = tiny_model(variant), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _layer, args, output: seen.extend([args[0], output]))
    hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for tensor in seen:
        assert type(tensor) is torch.Tensor
        assert tensor.shape == (*ids.shape, model.config.hidden_size)
    for output, following in zip(seen[1::2], seen[2::2], strict=False):
        assert output is following
    for recorded, output in zip(hidden[1:-1], seen[1:-2:2], strict=True):
        assert torch.equal(recorded, output)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hook_can_change_what_the_next_layer_reads(variant, ids):
    model = tiny_model(variant)
    seen = []
    model.model.layers[0].register_forward_hook(lambda *call: call[-1] + 1.0)
    model.model.layers[1].register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
    norm = model.model.layers[1].input_layernorm
    norm.register_forward_pre_hook(lambda _norm, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    assert torch.equal(*seen)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_observers_change_neither_the_form_nor_a_bit(
    variant, compiler, grad, ids, mixes, monkeypatch
):
    if compiler and c_kernels.library() is None:
        pytest.skip("there is no C compiler")
    if not compiler:
        monkeypatch.setattr(c_kernels, "library", lambda: None)
    model, calls = tiny_model(variant), []
    with torch.set_grad_enabled(grad):
        alone = model(ids).logits
        before = list(mixes)
        mixes.clear()
        with observe_depth(model, calls.append):
            watched = model(ids).logits
    assert torch.equal(alone, watched)
    assert mixes == before
    # Router r follows sublayer r; the form of the authors has none before the first sublayer.
    routers = {"vanilla": range(0), "official": range(1, 9)}.get(variant, range(9))
    assert [call.router for call in calls] == list(routers)
    for call in calls:
        rows = call.weights_BTS.sum(-1) + call.null_BT
        if variant != "oasis_depth_sigmoid":
            torch.testing.assert_close(rows, torch.ones_like(rows))


def test_observed_weights_are_those_of_the_differentiable_form(ids):
    model, calls = tiny_model("oasis_block"), ([], [])
    for grad, seen in zip((True, False), calls, strict=True):
        with torch.set_grad_enabled(grad), observe_depth(model, seen.append):
            model(ids)
    for one, other in zip(*calls, strict=True):
        torch.testing.assert_close(one.weights_BTS, other.weights_BTS, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["oasis", "oasis_block", "official"])
def test_a_recomputed_layer_keeps_nothing_alive(variant, ids):
    """Activation checkpointing saves memory only if what a layer computes again is freed again."""
    model, again = tiny_model(variant).train(), []
    model.activation_checkpointing_enable()
    loss = model(ids, labels=ids, use_cache=False).loss

    def in_backward(_module, _args, output):
        again.append(weakref.ref(output))

    alive = []

    def after_first(_grad):
        gc.collect()
        alive.append(sum(ref() is not None for ref in again))

    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(in_backward)
    model.model.embed_tokens.weight.register_hook(after_first)
    loss.backward()
    assert len(again) == len(model.model.layers)
    assert alive == [0]


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-10, msg=name)


SAVED = {
    "products": lambda op: op is torch.ops.aten.mm.default,
    "attention": lambda op: "attention" in str(op),
    "nothing": lambda op: False,  # noqa: ARG005
}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("variant", [*VARIANTS, "softmax1", "oasis_unit"])
def test_selective_checkpointing(variant, saved, ids):
    """It keeps some operations' results as they are, and repeats the others in order."""
    model = tiny_model(variant, dtype=torch.float64).train()
    expected = gradients(model, ids)

    def policy(_context, op, *_args, **_keywords):
        kept = SAVED[saved](op)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    assert_equal(gradients(model, ids), expected)


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("variant", ["oasis", "oasis_block", "official"])
def test_observers_and_checkpointed_layers(variant, forward, backward, ids):
    model, calls = tiny_model(variant, dtype=torch.float64).train(), []
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable()
    model.zero_grad()
    with observe_depth(model, calls.append) if forward else nullcontext():
        loss = model(ids, labels=ids, use_cache=False).loss
    with observe_depth(model, calls.append) if backward else nullcontext():
        loss.backward()
    assert_equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
    assert len(calls) == forward * (8 if variant == "official" else 9)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("variant", ["oasis", "oasis_block", "oasis_unit", "official"])
def test_recomputed_mixes_do_as_hooks_ask(variant, checkpointing, ids):
    model = tiny_model(variant, dtype=torch.float64).train()
    shift = torch.nn.Parameter(torch.linspace(-1, 1, 32, dtype=torch.float64))
    model.model.register_parameter("shift", shift)
    model.model.layers[1].register_forward_hook(lambda *call: call[-1] + shift)
    model.model.layers[2].register_forward_pre_hook(lambda _, args: (args[0] * 1.5, *args[1:]))
    expected = gradients(model, ids)
    model.recompute_mixes()
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert "model.shift" in expected
    assert_equal(gradients(model, ids), expected)


def test_no_observer_stays(ids):
    model, calls = tiny_model(), []
    with observe_depth(model, calls.append), pytest.raises(UserError, match="input_ids"):
        model()
    model(ids)
    assert calls == []
