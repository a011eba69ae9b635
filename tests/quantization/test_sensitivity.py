"""Ranges and errors of each tensor, and the sensitivity to each of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from oasis_attn.errors import UserError
from oasis_attn.quantization import linear_targets, quantize, quantized_modules, schemes
from oasis_attn.quantization.quantizers import fake_quantize_dynamic
from oasis_attn.quantization.sensitivity import measure_sensitivity, perplexity, target_metrics
from tiny_models import VOCABULARY, tiny_config

TABLE = schemes()


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=2, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config).eval()


def batches():
    return [torch.randint(3, VOCABULARY, (2, 12), generator=torch.manual_seed(i)) for i in range(3)]


def test_perplexity_matches_the_loss_of_the_model(model):
    ids = torch.cat(batches())
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.exp().item()
    assert perplexity(model, ids) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_errors_and_ranges_by_target(model):
    quantized_model = quantize(model, "w8a8-static-full", calibration=batches())
    values = {(m.name, m.where): m.value for m in target_metrics(quantized_model, batches())}
    targets = quantized_modules(quantized_model)
    assert {where for name, where in values if name.endswith("activation_error")} == set(targets)
    assert {where for name, where in values if name.endswith("weight_error")} == set(
        linear_targets(model)
    )
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight
    moved = fake_quantize_dynamic(weight, TABLE["w8a8-static-full"].weight) - weight
    expected = (moved.norm() / weight.norm()).square().item()
    assert values["quantization.weight_error", name] == pytest.approx(expected)
    quantizer = targets["model.norm:output"]
    low, high = quantizer.range
    assert values["quantization.low", "model.norm:output"] == low
    assert values["quantization.high", "model.norm:output"] == high
    assert high - low == pytest.approx(255 * values["quantization.scale", "model.norm:output"])

    seen = []
    quantizer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    for ids in batches():
        quantized_model.model(input_ids=ids)
    error = sum((out - x).square().sum() for x, out in seen) / sum(
        x.square().sum() for x, _ in seen
    )
    found = values["quantization.activation_error", "model.norm:output"]
    assert found == pytest.approx(error.item(), rel=1e-4)
    assert 0 < found < 1e-3


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_only_one_group_equals_quantizing_that_group_alone(model, rotation):
    scheme, ids = replace(TABLE["w4a4"], rotation=rotation), torch.cat(batches())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = measure_sensitivity(
        model, scheme, lambda quantized_model: perplexity(quantized_model, ids)
    )
    kinds = [name.split(".", 3)[3] for name in linear_targets(model)[:7]]
    assert list(scores) == ["all", "none", *kinds]
    assert scores["all"][0] == perplexity(quantize(model, scheme), ids)
    assert scores["none"][0] == pytest.approx(perplexity(model, ids), rel=1e-4)
    for kind in ("mlp.down_proj", "self_attn.q_proj"):
        alone = [name for name in linear_targets(model) if name.endswith(kind)]
        others = [name for name in linear_targets(model) if not name.endswith(kind)]
        expected = [
            perplexity(quantize(model, scheme, targets=targets), ids) for targets in (others, alone)
        ]
        # The inputs of layers that are not targets are not rotated, which changes last digits.
        rounding = 0 if rotation == "none" else 1e-4
        assert list(scores[kind]) == pytest.approx(expected, rel=rounding, abs=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_tensors_between_layers_are_groups_too(model):
    ids = torch.cat(batches())
    scores = measure_sensitivity(
        model,
        TABLE["w8a8-static-full"],
        lambda quantized_model: perplexity(quantized_model, ids),
        calibration=batches(),
        by="layer",
    )
    layers = ["model.layers.0", "model.layers.1"]
    assert list(scores) == ["all", "none", *layers, "model.norm:input", "model.norm:output"]
    assert len({value for pair in scores.values() for value in pair}) > len(scores)


def test_unknown_grouping(model):
    with pytest.raises(UserError, match=r"by: 'kinds' is not one of .*did you mean 'kind'"):
        measure_sensitivity(model, TABLE["w4a4"], perplexity, by="kinds")
