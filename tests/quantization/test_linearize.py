"""Linear layers of other classes are quantized like the equivalent `nn.Linear`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, FalconMambaConfig

from oasis_attn.errors import UserError
from oasis_attn.hub.loading import quiet
from oasis_attn.quantization import linear_targets, quantize, quantized_modules, schemes
from oasis_attn.quantization.coverage import float_weights, quantized_share
from oasis_attn.quantization.linearize import linear_names, linearize
from oasis_attn.quantization.simulate import transformed_copy
from tiny_models import VOCABULARY, tiny_config

TABLE = schemes()
SCHEMES = {
    "dynamic": TABLE["w8a8-dynamic"],
    "static": TABLE["w8a8-static-linear"],
    "w4a16": TABLE["w4a16"],
    "gptq": replace(TABLE["w4a8"], rounding="gptq"),
    "smoothed": replace(TABLE["w8a8-static-linear"], smooth_alpha=0.5),
    "rotated": replace(TABLE["w4a4"], rotation="inputs"),
}
TARGETS = {
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "openai-gpt": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "falcon": (
        *("self_attention.query_key_value", "self_attention.dense"),
        *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
}


def make(kind):
    torch.manual_seed(0)
    if kind == "falcon":
        config = FalconConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            bias=True, initializer_range=0.2,
        )  # fmt: skip
    else:
        config = tiny_config(kind, num_hidden_layers=2, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batches():
    return [torch.randint(3, VOCABULARY, (2, 12), generator=torch.manual_seed(i)) for i in range(3)]


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def with_linears(model):
    """The same model with its layers converted to `nn.Linear`."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("Conv1D", "FalconLinear"):
            weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
            linear = nn.Linear(*reversed(weight.shape))
            linear.load_state_dict({"weight": weight, "bias": module.bias})
            model.set_submodule(name, linear)
    return model


@pytest.mark.parametrize("kind", TARGETS)
def test_every_layer_is_found(kind):
    model = make(kind)
    expected = [f"transformer.h.{i}.{name}" for i in range(2) for name in TARGETS[kind]]
    assert list(linear_targets(model)) == expected
    quantized_model = quantize(model, "w8a8-dynamic")
    assert list(quantized_modules(quantized_model)) == expected
    assert (quantized_share(quantized_model), float_weights(quantized_model)) == (1.0, {})


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", SCHEMES)
def test_is_quantized_like_the_equivalent_linear_layer(kind, name, ids, tmp_path):
    model, scheme = make(kind), SCHEMES[name]
    calibration = batches() if scheme.needs_calibration else None
    quantized_model = quantize(model, scheme, calibration=calibration)
    equal = quantize(with_linears(make(kind)), scheme, calibration=calibration)
    found = logits(quantized_model, ids)
    torch.testing.assert_close(found, logits(equal, ids))
    for name, layer in quantized_modules(equal).items():
        torch.testing.assert_close(quantized_model.get_submodule(name).weight, layer.weight)
    assert (found - logits(model, ids)).norm() > 1e-4 * found.norm()
    with quiet():
        quantized_model.save_pretrained(tmp_path)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded, ids), found)


def test_layers_that_are_no_targets_do_not_change(ids):
    model = make("gpt2")
    targets = [name for name in linear_targets(model) if "c_attn" not in name]
    quantized_model = quantize(model, SCHEMES["smoothed"], calibration=batches(), targets=targets)
    assert type(quantized_model.transformer.h[0].attn.c_attn) is type(
        model.transformer.h[0].attn.c_attn
    )
    left = [f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)]
    assert list(float_weights(quantized_model)) == left
    assert logits(quantized_model, ids).isfinite().all()


@pytest.mark.parametrize("kind", ["gpt2", "falcon"])
def test_trainable_weights_stay_trainable(kind):
    model = make(kind)
    names = list(linear_names(model))
    model.get_submodule(names[0]).weight.requires_grad_(False)
    linearize(model, names)
    model(input_ids=batches()[0], labels=batches()[0]).loss.backward()
    assert model.get_submodule(names[0]).weight.grad is None
    assert model.get_submodule(names[1]).weight.grad.abs().sum() > 0


def test_a_weight_used_without_its_layer_is_not_quantized(ids, tmp_path):
    """Rotating only this weight would change the function."""
    torch.manual_seed(0)
    config = FalconMambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=4
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    scheme = SCHEMES["rotated"]
    targets = linear_targets(model)
    quantized_model = transformed_copy(model, scheme, None, targets, 0)
    torch.testing.assert_close(logits(quantized_model, ids), logits(model, ids), rtol=0, atol=1e-5)
    quantized_model = quantize(model, scheme)
    assert "backbone.layers.1.mixer.dt_proj.weight" in float_weights(quantized_model)
    with pytest.raises(UserError, match=r"targets: .*dt_proj' is not one of"):
        quantize(model, scheme, targets=[*targets, "backbone.layers.1.mixer.dt_proj"])
    with quiet():
        quantized_model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(quantized_model, ids))
