"""Decoders without the part of the first token in attention."""

from __future__ import annotations

import pytest
import torch

from oasis_attn.data.trigger import TriggerTask
from oasis_attn.lab.decoder import embed, new_decoder, predict
from oasis_attn.lab.sink_removal import ValueNorms, sink_removed
from oasis_attn.modeling.attention import observe_attention
from oasis_attn.modeling.variants import settings_of

TASK = TriggerTask(length=8)
X_BTN = TASK.batch(3, torch.Generator().manual_seed(0)).x_BTN


def decoder(size, variant, **settings):
    model = new_decoder(size, settings_of(variant) | settings, TASK, seed=0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name or "null" in name:
                parameter.mul_(10)  # weights that are far from uniform
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "settings"),
    [("vanilla", {}), ("oasis_signal_off", {"null_logit": 1}), ("kv_null", {})],
)
def test_renormalized_it_is_a_mask_over_the_first_key(variant, settings):
    model = decoder("lab-2", variant, **settings)
    mask_TS = torch.ones(8, 8, dtype=torch.bool).tril()
    mask_TS[1:, 0] = False
    mask = mask_TS.expand(3, 1, 8, 8)
    expected = model(
        inputs_embeds=embed(model, X_BTN),
        attention_mask=mask,
        position_ids=torch.arange(8)[None],
        use_cache=False,
    ).logits
    plain = predict(model, X_BTN)
    with sink_removed(model, renormalize=True):
        removed = predict(model, X_BTN)
    assert torch.allclose(removed, expected, atol=1e-5)
    assert not torch.allclose(removed[:, 2:], plain[:, 2:], atol=1e-2)
    assert torch.equal(predict(model, X_BTN), plain)


@torch.no_grad()
def test_otherwise_the_value_of_the_first_token_is_0():
    model = decoder("lab-1", "softmax1", null_logit=1)
    with sink_removed(model, renormalize=False):
        removed = predict(model, X_BTN)
    mask_T1 = (torch.arange(8) > 0).unsqueeze(-1)
    projection = model.model.layers[0].self_attn.v_proj
    with projection.register_forward_hook(lambda _m, _i, value: value * mask_T1):
        expected = predict(model, X_BTN)
    assert torch.allclose(removed[:, 1:], expected[:, 1:], atol=1e-5)
    assert torch.equal(removed[:, 0], predict(model, X_BTN)[:, 0])


@torch.no_grad()
def test_value_norms():
    model = decoder("lab-1", "kv_null")
    norms = ValueNorms(model)
    with observe_attention(model, norms.update):
        predict(model, X_BTN)
    attention = model.model.layers[0].self_attn
    x_BTD = model.model.layers[0].input_layernorm(embed(model, X_BTN))
    found = norms.tables()
    for head, part in enumerate((slice(0, 32), slice(32, 64))):
        weight = attention.o_proj.weight[:, part]
        norm_BT = (attention.v_proj(x_BTD)[..., part] @ weight.T).norm(dim=-1)
        null = (weight @ model.model.layers[0].null_value[head, 0]).norm()
        others = norm_BT[:, 1:].mean()
        assert found["first"][0][head] == pytest.approx(float(norm_BT[:, 0].mean() / others))
        assert found["null"][0][head] == pytest.approx(float(null / others))
