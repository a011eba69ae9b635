from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from oasis_attn.hub.prefix import compute_prefix, with_prefix
from oasis_attn.measure import diagnose
from oasis_attn.measure.hooks import HookPoint
from oasis_attn.measure.secondary_sinks import SecondarySinks, Sink, large_states
from oasis_attn.measure.sinks import Sinks, first_position_norms

from .models import native, tokens


@pytest.mark.parametrize("bias", [False, True])
def test_value_weighted_norm_is_the_sum_over_heads(bias):
    torch.manual_seed(0)
    projection = nn.Linear(4 * 8, 20, bias=bias).double()
    p_BHT, value_BHd = torch.rand(2, 4, 5).double(), torch.randn(2, 4, 8).double()
    parts_HDd = projection.weight.view(20, 4, 8).transpose(0, 1)
    expected = torch.einsum("bht,hDd,bhd->btD", p_BHT, parts_HDd, value_BHd).norm(dim=-1)
    with torch.no_grad():
        torch.testing.assert_close(first_position_norms(p_BHT, value_BHd, projection), expected)


def test_value_weighted_norm_reads_any_weight_layout():
    torch.manual_seed(0)
    linear, conv = nn.Linear(32, 20), Conv1D(20, 32)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
        inputs = torch.rand(2, 4, 5), torch.randn(2, 4, 8)
        torch.testing.assert_close(
            first_position_norms(*inputs, conv), first_position_norms(*inputs, linear)
        )


def test_value_weighted_sink_of_a_model_with_fewer_key_heads():
    model, ids = native("llama", "eager"), tokens(2, 20)
    record = diagnose(model, ids)
    values = []
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _i, v: values.append(v))
    with torch.no_grad():
        maps = model(input_ids=ids, output_attentions=True).attentions
    for layer, p_BHTS in enumerate(maps):
        value_BHd = values[layer][:, 0].view(2, 2, 8)[:, [0, 0, 1, 1]]
        weight = model.model.layers[layer].self_attn.o_proj.weight
        share_BTHd = p_BHTS[:, :, 1:, 0].transpose(1, 2)[..., None] * value_BHd[:, None]
        norm = (share_BTHd.flatten(2) @ weight.T).norm(dim=-1).mean().item()
        assert record.tables["sink.value_weighted"][layer] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("length", [20, 64, 70, 200])
def test_sink_tokens_are_those_of_the_eager_map(length):
    ids = tokens(3, length)
    record = diagnose(native("llama"), ids)
    with torch.no_grad():
        maps = native("llama", "eager")(input_ids=ids, output_attentions=True).attentions
    step = -(-length // 64)
    received_NLHT = torch.stack([p[:, :, step - 1 :: step].mean(2) for p in maps], dim=1)
    sink_NLHT = received_NLHT > 0.3
    count_N = sink_NLHT.any(2).any(1).sum(-1)
    assert record["sink.tokens@0.3"] == pytest.approx(count_N.double().mean().item())
    rows = record.tables["sink.tokens"]
    assert len(rows) == min(10, int(count_N.sum()))
    for row in rows:
        (window,) = (ids[:, row["position"]] == row["token"]).nonzero()[: row["windows"]]
        sink_LH = sink_NLHT[window.item(), :, :, row["position"]]
        assert row["heads"] == int(sink_LH.sum())
        assert row["layers"] == sink_LH.any(1).nonzero().flatten().tolist()
        received = received_NLHT[window.item(), :, :, row["position"]][sink_LH]
        assert row["received"] == pytest.approx(received.mean().item(), rel=1e-5)


def test_a_sink_in_a_prefix_has_a_negative_position():
    ids = tokens(1, 3)  # so few that the prefix is a sink in some head
    together = torch.cat([torch.tensor([[7]]), ids], dim=1)
    with torch.no_grad():
        maps = native("llama", "eager")(input_ids=together, output_attentions=True).attentions
    received_LH = torch.cat(maps)[:, :, 1:, 0].mean(-1)
    model = native("llama")
    record = diagnose(with_prefix(model, compute_prefix(model, [7])), ids)
    # The queries of the text, with the first one, are later than the first position.
    assert record["sink.mass"] == pytest.approx(received_LH.mean().item(), rel=1e-5)
    (row,) = (row for row in record.tables["sink.tokens"] if row["token"] == 7)
    assert row["position"] == -1
    assert row["heads"] == int((received_LH > 0.3).sum()) > 0
    assert row["received"] == pytest.approx(received_LH[received_LH > 0.3].mean().item(), rel=1e-5)


def planted(norms, alike, tokens=6):
    """States [L, 1, T, 2]: the first token along the first axis, as long as `norms` says; in state
    l the tokens `alike[l]` along it too, the rest across."""
    states_LBTD = torch.zeros(len(norms), 1, tokens, 2)
    for state, (norm, positions) in enumerate(zip(norms, alike, strict=True)):
        states_LBTD[state, 0, :, 1] = 1
        states_LBTD[state, 0, 0] = torch.tensor([norm, 0.0])
        for position, sign in positions.items():
            states_LBTD[state, 0, position] = torch.tensor([sign * 5.0, 1.0])
    return states_LBTD


def classified(states_LBTD):
    sinks = SecondarySinks(len(states_LBTD))
    ids_BT = torch.arange(states_LBTD.shape[2])[None] + 10
    for x_BTD in states_LBTD:
        sinks.update(x_BTD, ids_BT)
    return sinks


def test_the_window_is_from_the_steepest_rise_to_the_steepest_fall_after_it():
    assert large_states(torch.tensor([1.0, 2, 90, 95, 94, 30, 29, 10])) == (2, 5)
    assert large_states(torch.tensor([90.0, 1, 2, 3, 80, 70, 90])) == (
        4,
        5,
    )  # falls before do not count
    assert large_states(torch.tensor([1.0, 2, 3, 90])) == (3, 4)
    assert large_states(torch.tensor([3.0])) == (0, 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_tokens_are_sorted_by_the_number_of_their_states(sign):
    """L = 30: copies of the first token from 15 states, secondary sinks from 5, noise up to 4."""
    states = range(30)
    norms = [100.0 if 3 <= state < 25 else 1.0 for state in states]
    spans = {1: range(5, 20), 2: range(5, 19), 3: [*range(4, 7), *range(9, 11)], 4: range(4, 8),
             5: [*range(3), *range(25, 30)]}  # fmt: skip
    alike = [{t: sign for t, span in spans.items() if state in span} for state in states]
    sinks = classified(planted(norms, alike))
    values = {metric.name: metric.value for metric in sinks.metrics()}
    assert values == {"sink.secondary_tokens@L-15": 2, "sink.first_copies@L-15": 1}
    assert [(sink.position, sink.token, len(sink.states)) for sink in sinks.found] == [
        (2, 12, 14), (3, 13, 5),
    ]  # fmt: skip
    assert [sink.states[0] for sink in sinks.found] == [5, 4]
    assert sinks.windows == [{"position": 0, "start": 3, "end": 25}]


def test_few_states_have_a_limit_of_half_of_them_under_another_name():
    """L = 12: copies from 6 states, secondary sinks of 5."""
    norms = [1.0, 50, 50, 50, 50, 50, 50, 50, 50, 50, 1, 1]
    spans = {1: range(1, 7), 2: range(2, 7), 3: range(2, 6)}
    alike = [{t: 1 for t, span in spans.items() if state in span} for state in range(12)]
    values = {metric.name: metric.value for metric in classified(planted(norms, alike)).metrics()}
    assert values == {"sink.secondary_tokens@L/2": 1, "sink.first_copies@L/2": 1}


def test_the_second_token_may_be_the_sink_token():
    states_LBTD = planted([1.0, 50, 50, 50, 50, 50, 50, 1, 1, 1, 1, 1], [{4: 1}] * 12)
    swapped = states_LBTD[:, :, [1, 0, 2, 3, 4, 5]]
    for states, position in ((states_LBTD, 0), (swapped, 1)):
        sinks = classified(states)
        assert sinks.windows == [{"position": position, "start": 1, "end": 7}]
        assert sinks.metrics()[1].value == 1  # token 4, and never token 0


def test_batches_and_windows_are_kept_apart():
    ids_BT = torch.tensor([[10, 11, 12, 13, 14, 15]] * 2)
    one = planted(
        [1.0, 50, 50, 50, 50, 50, 50, 1, 1, 1, 1, 1], [{3: 1} if s < 6 else {} for s in range(12)]
    )
    none = planted([1.0, 50, 50, 50, 50, 50, 50, 1, 1, 1, 1, 1], [{}] * 12)
    sinks = SecondarySinks(12)
    for _batch in range(2):
        for x_BTD, y_BTD in zip(none, one, strict=True):
            sinks.update(torch.cat([x_BTD, y_BTD]), ids_BT)
    assert [(sink.window, sink.position) for sink in sinks.found] == [(1, 3), (3, 3)]
    assert sinks.metrics()[0].value == 0.5


def test_the_score_is_the_attention_that_a_secondary_sink_receives():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=12,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager").double().eval()
    ids_NT, states = tokens(2, 9), (2, 3, 5, 6, 7)
    with torch.no_grad():
        maps = model(input_ids=ids_NT, output_attentions=True).attentions
        sinks = SecondarySinks(12)
        for _state in range(12):
            sinks.update(torch.zeros(2, 9, 4), ids_NT)
        sinks.found = [Sink(1, 4, int(ids_NT[1, 4]), states)]
        state = torch.get_rng_state()
        sinks.score(model, ids_NT)
    expected = torch.stack([maps[layer][1, :, 4:, 4].mean() for layer in states]).mean().item()
    assert torch.equal(torch.get_rng_state(), state)
    (metric,) = [m for m in sinks.metrics() if m.name == "sink.secondary_score@L/2"]
    assert metric.value == pytest.approx(expected, rel=1e-5)
    assert sinks.tables()["sink.secondary_tokens"] == [
        {
            "window": 1, "position": 4, "token": int(ids_NT[1, 4]), "first_layer": 2, "layers": 5,
            "score": pytest.approx(expected, rel=1e-5),
        }
    ]  # fmt: skip

    prefixed, scored = with_prefix(model, compute_prefix(model, [7, 11])), SecondarySinks(12)
    scored.found = sinks.found
    with torch.no_grad():
        scored.score(prefixed, ids_NT)
        whole_NS = torch.cat([torch.tensor([[7, 11]] * 2), ids_NT], 1)
        maps = model(input_ids=whole_NS, output_attentions=True).attentions
    expected = torch.stack([maps[layer][1, :, 6:, 6].mean() for layer in states]).mean().item()
    assert scored.tables()["sink.secondary_tokens"][0]["score"] == pytest.approx(expected, rel=1e-5)


def test_rows_that_attend_to_nothing_have_no_renormalized_mass():
    sinks = Sinks([HookPoint(name="o", kind="attention", layer=0, module=nn.Linear(8, 8))])
    p_BHT = torch.tensor([[[1.0, 0.2, 0.0, 0.1]]])
    call = SimpleNamespace(
        layer=0,
        column=lambda _: p_BHT,
        null_BHT=torch.tensor([[[0.0, 0.6, 1.0, 0.0]]]),
        value_BGSd=torch.zeros(1, 1, 4, 8),
    )
    with torch.no_grad():
        sinks.update(call)
    values = {metric.name: metric.value for metric in sinks.metrics()}
    assert values["sink.mass"] == pytest.approx(0.1)
    assert values["sink.mass_renormalized"] == pytest.approx((0.5 + 0.1) / 2)
    assert values["null.mass"] == pytest.approx(0.4)
