"""The metrics of a decoder on the trigger task, against a brute-force computation."""

from __future__ import annotations

from contextlib import ExitStack
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from oasis_attn.data.tasks import task_by_name
from oasis_attn.data.trigger import TriggerBatch
from oasis_attn.lab import (
    DecoderTraining,
    measure_decoder,
    predict,
    quantized_errors,
    train_decoder,
)
from oasis_attn.modeling.depth_cache import null_signal_off
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.modeling.variants import settings_of
from oasis_attn.quantization import quantize

TASK = task_by_name("trigger-every-12")


def sequences(seed: int) -> TriggerBatch:
    return TASK.batch(9, torch.Generator().manual_seed(seed))


def decoder(variant: str, **settings: Any) -> OasisForCausalLM:
    training = DecoderTraining(steps=20, batch_size=8, warmup_steps=2, learning_rate=1e-2)
    return train_decoder("lab-2", settings_of(variant) | settings, TASK, training, seed=0).model


@pytest.fixture(scope="module")
def oasis() -> OasisForCausalLM:
    model = decoder("oasis", null_logit=2.0, beta_init=1.0)
    with torch.no_grad():
        assert model.model.depth is not None
        model.model.depth.queries.normal_(std=0.5)
    return model


def values(model: OasisForCausalLM, batch: TriggerBatch) -> dict[str, float]:
    metrics, _ = measure_decoder(model, batch)
    return {metric.name: metric.value for metric in metrics if not metric.where}


def test_errors(oasis):
    batch = sequences(1)
    found = values(oasis, batch)
    squares, triggers, idle = [], [], []
    with torch.no_grad():
        output_BTN = predict(oasis, batch.x_BTN)
    for b, t in torch.cartesian_prod(torch.arange(9), torch.arange(12)).tolist():
        square = (output_BTN[b, t] - batch.y_BTN[b, t]).double().square().mean()
        squares.append(square)
        if batch.x_BTN[b, t, 1]:
            triggers.append(square)
        elif t:
            idle.append(square)
    mean = torch.stack(squares).mean()
    assert found["task.error"] == pytest.approx(float(mean))
    assert found["task.relative_error"] == pytest.approx(float(mean / batch.y_BTN.square().mean()))
    assert found["task.error_trigger"] == pytest.approx(float(torch.stack(triggers).mean()))
    assert found["task.error_idle"] == pytest.approx(float(torch.stack(idle).mean()))
    largest = float((output_BTN - batch.y_BTN).abs().max())
    assert found["task.largest_error"] == pytest.approx(largest)


def test_largest_value_over_the_median(oasis):
    batch = sequences(1)
    outputs = []
    with ExitStack() as stack, torch.no_grad():
        for layer in oasis.model.layers:
            hook = layer.register_forward_hook(lambda *args: outputs.append(args[-1]))
            stack.callback(hook.remove)
        predict(oasis, batch.x_BTN)
    tensors = [output[0] if isinstance(output, tuple) else output for output in outputs]
    expected = max(
        fmean(float(x_TD.abs().max() / x_TD.abs().median()) for x_TD in x_BTD) for x_BTD in tensors
    )
    assert values(oasis, batch)["outlier.max_over_median"] == pytest.approx(expected)


@pytest.mark.parametrize("variant", ["vanilla", "softmax1", "softpick", "official"])
def test_first_token_and_null_probabilities(variant):
    model, batch = decoder(variant), sequences(1)
    metrics, tables = measure_decoder(model, batch)
    found = {metric.name: metric.value for metric in metrics if not metric.where}
    with torch.no_grad():
        maps: tuple[Tensor, ...] = model(
            inputs_embeds=batch.x_BTN @ model.get_input_embeddings().weight,
            output_attentions=True,
        ).attentions
    for kind, mask_BT in (("idle", batch.idle_BT), ("trigger", batch.trigger_BT)):
        first_LH = torch.stack([p[..., 0].transpose(0, 1)[:, mask_BT].mean(-1) for p in maps])
        null_LH = torch.stack([1 - p.sum(-1).transpose(0, 1)[:, mask_BT].mean(-1) for p in maps])
        assert found[f"sink.{kind}"] == pytest.approx(float(first_LH.mean()), rel=1e-5)
        assert torch.allclose(torch.tensor(tables[f"sink.{kind}"]), first_LH, atol=1e-6)
        if variant == "vanilla":
            assert f"null.{kind}" not in found
        else:
            assert found[f"null.{kind}"] == pytest.approx(float(null_LH.mean()), rel=1e-4)
            assert torch.allclose(torch.tensor(tables[f"null.{kind}"]), null_LH, atol=1e-5)
        if kind == "idle":
            assert found["sink.idle_largest"] == pytest.approx(float(first_LH.max()), rel=1e-5)


def test_outliers_and_depth_are_those_of_the_hooked_modules(oasis):
    batch = sequences(1)
    found = values(oasis, batch)
    outputs: list[Tensor] = []
    parts = [oasis.model.norm]
    for layer in oasis.model.layers:
        parts += [layer, layer.self_attn.o_proj, layer.mlp]
        parts += [layer.input_layernorm, layer.post_attention_layernorm]
    handles = [
        part.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for part in parts
    ]
    with torch.no_grad():
        predict(oasis, batch.x_BTN)
    for handle in handles:
        handle.remove()
    largest = max(float(x_BTD.abs().flatten(1).amax(1).mean()) for x_BTD in outputs)
    assert found["outlier.max_inf_norm"] == pytest.approx(largest)
    assert found["outlier.massive"] == 0
    assert found["depth.entropy"] > 0


def test_the_effect_of_the_signal(oasis):
    batch = sequences(1)
    found = values(oasis, batch)
    assert oasis.model.depth is not None
    betas = torch.nn.functional.softplus(oasis.model.depth.beta_raw.detach())[1:]
    assert found["signal.beta"] == pytest.approx(float(betas.mean()))
    assert found["signal.beta_largest"] == pytest.approx(float(betas.max()))
    with torch.no_grad():
        plain_BTN = predict(oasis, batch.x_BTN)
        beta_raw = oasis.model.depth.beta_raw.clone()
        oasis.model.depth.beta_raw.fill_(-1e4)  # beta 0
        off_BTN = predict(oasis, batch.x_BTN)
        oasis.model.depth.beta_raw.copy_(beta_raw)
        with null_signal_off(oasis):
            assert torch.allclose(predict(oasis, batch.x_BTN), off_BTN, atol=1e-6)
    power = batch.y_BTN.square().mean()
    change = float((plain_BTN - off_BTN).square().mean() / power)
    assert found["signal.output_change"] == pytest.approx(change, rel=1e-3)
    errors = [(each - batch.y_BTN).square().mean() for each in (plain_BTN, off_BTN)]
    assert found["signal.error_change"] == pytest.approx(float(errors[1] - errors[0]), rel=1e-3)
    assert 0 < found["signal.weights_change"] < 1
    assert not any(name.startswith("signal") for name in values(decoder("vanilla"), batch))


def test_measuring_changes_nothing(oasis):
    batch, state = sequences(1), torch.get_rng_state()
    before = predict(oasis, batch.x_BTN)
    assert values(oasis, batch) == values(oasis, batch)
    assert torch.equal(predict(oasis, batch.x_BTN), before)
    assert oasis.config.null_signal == "on"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("variant", ["vanilla", "oasis"])
def test_errors_of_quantized_decoders(variant):
    model, batch, calibration = decoder(variant).requires_grad_(False), sequences(1), sequences(2)
    metrics, targets = quantized_errors(model, batch, calibration, ("w8a8-static-full", "w4a4"))
    found = {metric.name: metric.value for metric in metrics}
    weight = model.get_input_embeddings().weight
    plain = float((predict(model, batch.x_BTN) - batch.y_BTN).square().mean())
    for scheme, batches in (("w8a8-static-full", [calibration.x_BTN @ weight]), ("w4a4", None)):
        quantized = quantize(model, scheme, calibration=batches)
        error = float((predict(quantized, batch.x_BTN) - batch.y_BTN).square().mean())
        assert found[f"task.error@{scheme}"] == pytest.approx(error)
        assert found[f"task.error_increase@{scheme}"] == pytest.approx(error - plain, rel=1e-3)
        assert found[f"task.error_ratio@{scheme}"] == pytest.approx(error / plain)
    assert targets["w8a8-static-full"] > targets["w4a4"] == 14
