"""Int8 arithmetic computes the same as the simulation."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from oasis_attn.errors import UserError
from oasis_attn.hub.loading import quiet
from oasis_attn.quantization import QuantSpec, linear_targets, quantize, schemes
from oasis_attn.quantization.int8 import Int8Linear, check_kernels, to_int8
from tiny_models import VOCABULARY, tiny_config, tiny_model

utils = pytest.importorskip("torchao.utils", reason="torchao is not installed")
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    utils.should_reduce_range(CPU), reason="this processor has no VNNI instructions"
)
TABLE = schemes()
SCHEMES = {
    "dynamic": TABLE["w8a8-dynamic"],
    "static": TABLE["w8a8-static-linear"],
    "static symmetric": replace(
        TABLE["w8a8-static-linear"],
        weight=QuantSpec(bits=8, symmetric=True, granularity="channel"),
        activation=QuantSpec(bits=8, symmetric=True),
    ),
    "rotated": replace(TABLE["w8a8-dynamic"], rotation="hadamard", head=True),
}


def make(kind):
    if kind == "oasis":
        return tiny_model()
    torch.manual_seed(0)
    config = tiny_config(kind) if kind == "gpt2" else tiny_config(kind, attention_bias=True)
    return AutoModelForCausalLM.from_config(config).eval()


def simulated(kind, scheme):
    batches = [
        torch.randint(3, VOCABULARY, (2, 12), generator=torch.manual_seed(i)) for i in range(3)
    ]
    return quantize(make(kind), scheme, calibration=batches if scheme.needs_calibration else None)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name) for kind in ("llama", "oasis") for name in SCHEMES),
        *(
            (kind, name)
            for kind in ("mixtral", "gpt_oss", "gpt2")
            for name in ("dynamic", "static")
        ),
    ],
)
def test_equals_the_simulation_and_can_be_saved(kind, name, ids, tmp_path):
    quantized_model = simulated(kind, SCHEMES[name])
    expected, exact = logits(quantized_model, ids), logits(make(kind), ids)
    int8_model = to_int8(copy.deepcopy(quantized_model))
    layers = [m for m in int8_model.modules() if isinstance(m, Int8Linear)]
    assert len(layers) == len(linear_targets(make(kind), head=SCHEMES[name].head))
    assert all(layer.weight.shape == (0,) for layer in layers)
    found = logits(int8_model, ids)
    # A value half way between two codes may be rounded in either direction.
    assert (found - expected).norm() < 0.05 * (expected - exact).norm()
    with quiet():
        int8_model.save_pretrained(tmp_path)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded, ids), found)
    assert loaded.generate(ids[:1], max_new_tokens=2).shape == (1, ids.shape[1] + 2)


GROUPED = QuantSpec(bits=8, symmetric=True, granularity="group", group_size=8)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (
            TABLE["w8a8-static-full"],
            "'w8a8-static-full' can only be simulated: no kernel quantizes between",
        ),
        (TABLE["w4a4"], "8-bit weights by 8-bit activations only"),
        (TABLE["w4a16"], "8-bit weights by 8-bit activations only"),
        (replace(TABLE["w8a8-dynamic"], weight=GROUPED), "one scale per tensor or channel"),
        (
            replace(
                TABLE["w8a8-dynamic"],
                activation=QuantSpec(bits=8, symmetric=True, granularity="token"),
            ),
            "asymmetric ranges per token, or static ones",
        ),
        (replace(TABLE["w8a8-dynamic"], clip_ratio=0.9), "kernels do not clip dynamic ranges"),
    ],
)
def test_refuses_schemes_without_kernels(scheme, reason):
    with pytest.raises(UserError, match=reason):
        check_kernels(scheme, CPU)


def test_refuses_a_model_that_is_not_quantized():
    with pytest.raises(UserError, match="model: nothing in it is quantized"):
        to_int8(make("llama"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_a_model_saved_after_casts_computes_the_same(name, ids, tmp_path):
    quantized_model = to_int8(simulated("llama", SCHEMES[name]))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        quantized_model.to(dtype)
        with quiet():
            quantized_model.save_pretrained(tmp_path)
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.dtype == dtype == loaded.model.layers[0].mlp.up_proj.weight.dtype
        assert torch.equal(loaded(ids).logits, quantized_model(ids).logits)
    with pytest.raises(UserError, match="int8 kernels do not support float64"):
        quantized_model.double()(ids)
