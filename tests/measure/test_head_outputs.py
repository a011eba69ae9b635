from __future__ import annotations

import pytest
import torch

from oasis_attn.measure import diagnose

from .models import native, ours, tokens


@pytest.mark.parametrize("length", [7, 16, 40])
def test_the_norm_of_what_each_head_writes(length) -> None:
    model, ids = native("llama"), tokens(3, length)
    inputs = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, x: inputs.append(x[0]))
    with torch.no_grad():
        model(input_ids=ids)
    for layer in model.model.layers:
        layer.self_attn.o_proj._forward_pre_hooks.clear()
    step = -(-length // 16)
    expected = []
    for layer, x_BTM in zip(model.model.layers, inputs, strict=True):
        x_BTHd = x_BTM[:, step - 1 :: step].unflatten(-1, (4, 8))
        weight_DHd = layer.self_attn.o_proj.weight.unflatten(1, (4, 8))
        written_BTHD = torch.einsum("bthd,Dhd->bthD", x_BTHd, weight_DHd)
        expected.append(written_BTHD.square().sum(-1).mean((0, 1)).sqrt())
    for batch_size in (1, 2):
        record = diagnose(model, ids, batch_size=batch_size)
        found = torch.tensor(record.tables["head.output"], dtype=torch.float64)
        torch.testing.assert_close(found, torch.stack(expected))
    assert record["sink.silent_heads"] == 0


def test_a_head_that_writes_nothing_is_silent() -> None:
    model = native("qwen3")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 16:24] *= 0.01
    record = diagnose(model, tokens(2, 20))
    assert record.tables["sink.silent_heads"] == [[1, 2]]
    assert record["sink.silent_heads"] == 1


def test_a_head_idles_on_the_first_position_or_on_the_null() -> None:
    model, ids = native("llama"), tokens(2, 20)
    record = diagnose(model, ids)
    idle_LH = torch.tensor(record.tables["sink.mass"]) > 0.5
    assert record.tables["sink.idle_heads"] == idle_LH.nonzero().tolist()
    with torch.no_grad():  # uniform attention, and the null as large as e^8 keys
        model = ours("learned_sink")
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
        layer.null_logit.copy_(torch.tensor([8.0, -8.0, 8.0, -8.0]))
    record = diagnose(model, ids)
    last = len(model.model.layers) - 1
    assert [each for each in record.tables["sink.idle_heads"] if each[0] == last] == [
        [last, 0], [last, 2],
    ]  # fmt: skip
    assert record["sink.idle_heads"] == len(record.tables["sink.idle_heads"])
