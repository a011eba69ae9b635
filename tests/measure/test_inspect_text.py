"""What is recorded about one text equals what eager forward passes compute."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from oasis_attn.errors import UserError
from oasis_attn.hub.prefix import compute_prefix, with_prefix
from oasis_attn.measure import diagnose
from oasis_attn.measure.inspect_text import Inspection, Massive, inspect_text
from oasis_attn.ops import depth_mix
from tiny_models import tiny_config

from .models import native, ours, tokens

IDS = tokens(1, 20)[0].tolist()


def close(got: np.ndarray, want: torch.Tensor) -> None:
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-4, atol=1e-6)


def eager(model, ids=IDS, **kinds):
    """The outputs of modules whose names end with the given ends, by kind, and the attentions."""
    seen = {kind: [] for kind in kinds}
    handles = [
        module.register_forward_hook(
            lambda _m, _i, output, kind=kind: seen[kind].append(
                (output[0] if isinstance(output, tuple) else output).detach()
            )
        )
        for name, module in model.named_modules()
        for kind, end in kinds.items()
        if name.endswith(end)
    ]
    with torch.no_grad():
        outputs = model(input_ids=torch.tensor([ids]), output_attentions=True)
    for handle in handles:
        handle.remove()
    return outputs.attentions, seen


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_attention_and_activations_are_those_of_an_eager_model(family):
    found = inspect_text(native(family), IDS)
    model = native(family, "eager")
    layers = model.transformer.h if family == "gpt2" else model.model.layers
    name = next(name for name, module in model.named_modules() if module is layers[0])
    ends = {str(i): f"{name[:-1]}{i}" for i in range(len(layers))}
    attentions, seen = eager(model, **ends)
    for layer, (p_BHTS, (x_BTD,)) in enumerate(zip(attentions, seen.values(), strict=True)):
        close(found.attention_LHTS[layer], p_BHTS[0])
        sizes_T, channels_T = x_BTD[0].abs().max(-1)
        close(np.abs(found.largest_LT[layer]), sizes_T)
        assert found.channels_LT[layer].tolist() == channels_T.tolist()
        close(found.largest_LT[layer], x_BTD[0].gather(1, channels_T[:, None])[:, 0])
        close(found.medians_L[layer], x_BTD.abs().median())
    assert not found.has_null
    assert found.depth is None
    assert found.depth_off is None
    assert found.massive == ()


@pytest.mark.parametrize("weighted", [False, True])
def test_received_attention_is_the_mean_over_queries(weighted):
    """Weighted, each probability is multiplied by the norm of value times output projection."""
    found = inspect_text(native("llama"), IDS)
    model = native("llama", "eager")
    attentions, seen = eager(model, value="v_proj")
    for layer, p_BHTS in enumerate(attentions):
        value_SGd = seen["value"][layer][0].view(len(IDS), 2, 8)
        parts_DHd = model.model.layers[layer].self_attn.o_proj.weight.view(32, 4, 8)
        image_SHD = torch.einsum("shd,Dhd->shD", value_SGd[:, [0, 0, 1, 1]], parts_DHd)
        norms_HS = image_SHD.norm(dim=-1).T
        close(found.image_norms_LHS[layer], norms_HS)
        received_HS = p_BHTS[0].mean(1)
        if weighted:
            written_HS = received_HS * norms_HS
            received_HS = written_HS / written_HS.sum(-1, keepdim=True)
        close(found.received_LHS(weighted=weighted)[layer], received_HS)


@pytest.mark.parametrize("variant", ["oasis", "oasis_block", "kv_null"])
def test_the_null_and_what_is_read_from_it(variant):
    model = ours(variant)
    found = inspect_text(model, IDS)
    with torch.no_grad():
        outputs = model(torch.tensor([IDS]), output_attentions=True, output_null_probability=True)
    for layer, (p_BHTS, null_BHT) in enumerate(
        zip(outputs.attentions, outputs.null_probability, strict=True)
    ):
        close(found.attention_LHTS[layer], p_BHTS[0])
        close(found.null_LHT[layer], null_BHT[0])
        value_HMd = model.model.layers[layer].null_value
        if value_HMd is None:
            assert not found.null_norms_LHT[layer].any()
            continue
        assert value_HMd.shape[1] == 1
        parts_DHd = model.model.layers[layer].self_attn.o_proj.weight.view(32, 4, 8)
        norms_H = torch.einsum("hd,Dhd->hD", value_HMd[:, 0], parts_DHd).norm(dim=-1)
        close(found.null_norms_LHT[layer], null_BHT[0] * norms_H[:, None])
    assert found.has_null
    np.testing.assert_allclose(found.attention_LHTS.sum(-1) + found.null_LHT, 1, rtol=1e-5)


@pytest.mark.parametrize("signal", ["on", "off"])
def test_depth_weights_are_those_of_naive_mixes(signal):
    model = ours("oasis")
    found = inspect_text(model, IDS)
    assert model.config.null_signal == "on"
    depth = found.depth if signal == "on" else found.depth_off
    if signal == "off":
        model.config.null_signal = "off"
    with torch.no_grad():
        queries_RD, beta_R = model.model.depth()
        _, seen = eager(model, embedding="embed_tokens", attention="self_attn", mlp=".mlp")
        null = model(torch.tensor([IDS]), output_null_probability=True).null_probability
        sources, psi = seen["embedding"][:1], [torch.zeros(1, len(IDS)).double()]
        branches = zip(seen["attention"], seen["mlp"], strict=True)
        for layer, (attention, mlp) in enumerate(branches):
            sources += [attention, mlp]
            psi += 2 * [null[layer].mean(1)]
        assert depth.routers == tuple(range(7))
        for router in depth.routers:
            _, weights_BTS = depth_mix(
                sources[: router + 1], queries_RD[router], eps=model.model.depth.eps,
                null_evidence=psi[: router + 1] if signal == "on" else None,
                beta=beta_R[router], normalizer="softmax1", backend="naive",
            )  # fmt: skip
            close(depth.weights[router], weights_BTS[0])
            close(depth.null_RT[router], 1 - weights_BTS[0].sum(-1))


def test_official_routers_and_routers_without_a_signal():
    found = inspect_text(ours("official"), IDS)
    assert found.depth.routers == found.depth_off.routers == tuple(range(1, 7))
    found = inspect_text(ours("attn_residual"), IDS)
    assert found.depth.routers == tuple(range(7))
    assert found.depth_off is None


def test_massive_activations_have_their_position_and_channel():
    model = native("llama")
    model.model.embed_tokens.weight.data[IDS[6], 5] = -4e4
    position = IDS.index(IDS[6])
    found = inspect_text(model, IDS)
    want = [
        Massive(layer=layer, position=at, channel=5, value=pytest.approx(-4e4, rel=0.01))
        for layer in range(3)
        for at, token in enumerate(IDS)
        if token == IDS[position]
    ]
    assert list(found.massive) == want
    rows = diagnose(model, torch.tensor([IDS])).tables["outlier.massive"]
    assert {(row["layer"], row["channel"], row["first_position"]) for row in rows} == {
        (each.layer, each.channel, position) for each in found.massive
    }


def test_the_keys_of_a_prefix_come_first():
    model = native("llama").float()
    prefixed = with_prefix(model, compute_prefix(model, (5, 6, 7)))
    found, whole = inspect_text(prefixed, IDS), inspect_text(model, [5, 6, 7, *IDS])
    assert found.prefix == (5, 6, 7)
    assert found.ids == tuple(IDS)
    np.testing.assert_allclose(found.attention_LHTS, whole.attention_LHTS[:, :, 3:], atol=1e-5)
    np.testing.assert_allclose(found.largest_LT, whole.largest_LT[:, 3:], rtol=1e-4)


def test_a_model_is_left_as_it_was():
    for model in (native("llama"), ours("oasis")):
        before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
        model.train()
        found = inspect_text(model, IDS)
        assert isinstance(found, Inspection)
        assert model.training
        assert model.config.to_dict() == config
        assert not any(module._forward_hooks for module in model.modules())
        assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3], "text: 1 tokens; at least 2 are needed"),
        ([3, 50], "text: token 50 is outside the model's vocabulary of 50"),
        ([3] * 257, "text: 257 tokens are more than the model's 256 positions"),
    ],
)
def test_bad_tokens_are_refused(ids, message):
    with pytest.raises(UserError, match=message):
        inspect_text(native("llama"), ids)


def test_attention_whose_values_are_hidden_is_refused():
    model = AutoModelForCausalLM.from_config(tiny_config("bloom")).eval()
    with pytest.raises(UserError, match="family 'bloom' cannot be inspected: its attention"):
        inspect_text(model, [3, 4, 5])


def test_values_that_are_not_finite_are_refused():
    model = native("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(
        UserError, match="the output of layer 1 is not finite at token 0, in float64"
    ):
        inspect_text(model, IDS)
