from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from oasis_attn.training.outliers import OutlierPenalty, log_peak
from tiny_models import VOCABULARY, tiny_model


def test_values():
    x_BTD = torch.ones(2, 10, 4)
    assert log_peak(x_BTD).tolist() == [0, 0]
    x_BTD[1, 3] = 1e6
    assert log_peak(x_BTD).tolist() == pytest.approx([0, math.log(10)])
    assert torch.allclose(log_peak(x_BTD), log_peak(1000 * x_BTD))


def test_independent_form_and_gradients():
    torch.manual_seed(0)
    x_BTD = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    energy_BT = x_BTD.norm(dim=-1) ** 2
    expected = (energy_BT.amax(-1) / energy_BT.mean(-1)).log()
    assert torch.allclose(log_peak(x_BTD), expected, atol=1e-12)
    assert torch.autograd.gradcheck(log_peak, (x_BTD,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 3e4])
def test_finite(dtype, scale):
    x = (torch.randn(2, 4, 8) * scale).to(dtype).requires_grad_()
    log_peak(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.dtype == dtype


def test_every_tensor_that_linear_maps_read_counts_once():
    model = tiny_model().train()
    tokens = torch.randint(VOCABULARY, (3, 9))
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(name, args[0])
            )
    penalty = OutlierPenalty(model)
    with penalty.collect() as found:
        model(tokens)
    once = [
        x
        for name, x in inputs.items()
        if name.endswith(("q_proj", "o_proj", "up_proj", "down_proj"))
    ]
    assert len(found) == len(once) == 16
    expected = torch.stack([log_peak(x) for x in once]).mean()
    assert torch.stack(found).mean().item() == pytest.approx(expected.item(), rel=1e-6)
    model(tokens)
    assert len(found) == 16


def test_same_gradients_under_checkpointing():
    tokens = torch.randint(VOCABULARY, (2, 9))
    gradients = []
    for checkpointed in (False, True):
        model = tiny_model().train()
        if checkpointed:
            model.activation_checkpointing_enable()
        with OutlierPenalty(model).collect() as found:
            loss = model(tokens, labels=tokens).loss
        (loss + torch.stack(found).mean()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_outputs_of_layers():
    model = tiny_model().train()
    outputs = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output))
    penalty = OutlierPenalty(model, "layer_outputs")
    with penalty.collect() as found:
        model(torch.randint(VOCABULARY, (3, 9)))
    assert len(found) == len(outputs) == model.config.num_hidden_layers
    for peak_B, x_BTD in zip(found, outputs, strict=True):
        assert torch.equal(peak_B, log_peak(x_BTD))
