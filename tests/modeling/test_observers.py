"""Observers that are opened or closed in the middle of a forward pass."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM

from oasis_attn import UserError
from oasis_attn.modeling.attention import observe_attention
from oasis_attn.modeling.depth_cache import observe_depth
from tiny_models import tiny_config, tiny_model


@contextmanager
def opened_before_layer(model, layer, context):
    """`context` is entered in a forward pass, just before `layer`; it stays open until the end."""
    with ExitStack() as stack:
        hook = model.model.layers[layer].register_forward_pre_hook(
            lambda *_: stack.enter_context(context)
        )
        try:
            yield
        finally:
            hook.remove()


def same(one, other):
    assert one.router == other.router
    assert torch.equal(one.weights_BTS, other.weights_BTS)
    assert torch.equal(one.null_BT, other.null_BT)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("variant", ["oasis", "oasis_block", "official"])
def test_depth_observed_from_the_middle_is_right_or_refused(variant, grad, ids):
    model, whole, part = tiny_model(variant), [], []
    with torch.set_grad_enabled(grad):
        with observe_depth(model, whole.append):
            model(ids)
        with opened_before_layer(model, 2, observe_depth(model, part.append)):
            if not grad and variant != "official":
                with pytest.raises(UserError, match="observe_depth was opened in the middle of a"):
                    model(ids)
                return
            model(ids)
    for one, other in zip(whole[-4:], part, strict=True):
        same(one, other)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["oasis", "oasis_block"])
def test_a_second_observer_of_depth_sees_the_same_after_the_first_is_closed(variant, ids):
    model, whole, part = tiny_model(variant), [], []
    with observe_depth(model, whole.append):
        model(ids)
    with ExitStack() as first:
        first.enter_context(observe_depth(model, lambda _: None))
        close = model.model.layers[1].register_forward_pre_hook(lambda *_: first.close())
        with opened_before_layer(model, 2, observe_depth(model, part.append)):
            model(ids)
        close.remove()
    for one, other in zip(whole[-4:], part, strict=True):
        same(one, other)


@torch.no_grad()
def test_attention_observed_from_the_middle_is_the_same(ids):
    model, whole, part = tiny_model(), [], []
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with observe_attention(model, whole.append):
        model(ids, attention_mask=mask)
    with opened_before_layer(model, 2, observe_attention(model, part.append)):
        model(ids, attention_mask=mask)
    for one, other in zip(whole[2:], part, strict=True):
        assert one.layer == other.layer
        assert torch.equal(one.null_BHT, other.null_BHT)
        assert torch.equal(one.column(5), other.column(5))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_of_another_library_is_refused_from_the_middle(attention, ids):
    """The masks of the pass were made for another attention."""
    config = tiny_config(attn_implementation=attention)
    model, calls = AutoModelForCausalLM.from_config(config).eval(), []
    with (
        opened_before_layer(model, 2, observe_attention(model, calls.append)),
        pytest.raises(UserError, match="observe_attention was opened in the middle of a forward"),
    ):
        model(ids)
    assert not calls
    assert model.config._attn_implementation == attention
    for run in (model, model.model):
        with observe_attention(model, calls.append):
            run(ids)
        assert [call.layer for call in calls] == [0, 1, 2, 3]
        calls.clear()
    assert not any(module._forward_pre_hooks for module in model.modules())
