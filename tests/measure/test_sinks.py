from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from oasis_attn.measure import diagnose
from oasis_attn.measure.parts import Tap
from oasis_attn.measure.secondary import SecondarySinks
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


def hidden(*directions: tuple[float, float], first: float = 100.0) -> torch.Tensor:
    """One window: the first token `first` long along the first axis, then these states."""
    return torch.tensor([[(first, 0.0), *directions]])


def test_secondary_sinks_by_hand():
    """Four tokens along the second axis; the first token is long in layers 1 to 3 alone."""
    ids_BT = torch.tensor([[7, 8, 9, 8, 6]])
    across, along, askew = (0.0, 1.0), (2.0, 0.5), (1.0, 1.0)  # cosines 0, 0.97, 0.71
    sinks = SecondarySinks(5)
    for layer, x_BTD in enumerate(
        [
            hidden(along, across, across, across, first=2.0),  # not yet: the first token is short
            hidden(along, across, along, across),
            hidden(along, across, askew, across),
            hidden(along, along, along, across),
            hidden(along, across, across, across, first=2.0),
        ]
    ):
        sinks.see(layer, x_BTD, ids_BT)
    assert sinks.tables()["sink.secondary"] == [
        {"created": 1, "lifetime": 1, "token": 8, "count": 1, "first_position": 3},
        {"created": 1, "lifetime": 3, "token": 8, "count": 1, "first_position": 1},
        {"created": 3, "lifetime": 1, "token": 8, "count": 1, "first_position": 3},
        {"created": 3, "lifetime": 1, "token": 9, "count": 1, "first_position": 2},
    ]
    assert sinks.metrics()[0].value == 3  # tokens, not runs
    ratios = sinks.tables()["sink.first_norm_ratio"]
    assert ratios[0] < 3
    assert ratios[1] == pytest.approx(100)  # the lower median of 1, 1, 1 and 2.06


def test_secondary_sinks_that_reach_the_last_layer_are_closed_there():
    sinks = SecondarySinks(2)
    for _window in range(2):
        for layer in range(2):
            sinks.see(layer, hidden((1.0, 0.0), (0.0, 1.0)), torch.tensor([[5, 3, 4]]))
    assert sinks.tables()["sink.secondary"] == [
        {"created": 0, "lifetime": 2, "token": 3, "count": 2, "first_position": 1}
    ]
    assert sinks.metrics()[0].value == 1


def test_rows_that_attend_to_nothing_have_no_renormalised_mass():
    sinks = Sinks([Tap(name="o", kind="attention", layer=0, module=nn.Linear(8, 8))])
    p_BHT = torch.tensor([[[1.0, 0.2, 0.0, 0.1]]])
    call = SimpleNamespace(
        layer=0,
        column=lambda _: p_BHT,
        null_BHT=torch.tensor([[[0.0, 0.6, 1.0, 0.0]]]),
        value_BGSd=torch.zeros(1, 1, 4, 8),
    )
    with torch.no_grad():
        sinks.see(call)
    values = {metric.name: metric.value for metric in sinks.metrics()}
    assert values["sink.mass"] == pytest.approx(0.1)
    assert values["sink.mass_renormalised"] == pytest.approx((0.5 + 0.1) / 2)
    assert values["null.mass"] == pytest.approx(0.4)
