"""A quantised model comes back from disk as it was, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from oasis_attn.modeling.loading import quiet
from oasis_attn.quantization import Grid, Scheme, quantize, quantized_sites, schemes
from tiny import VOCABULARY, tiny_config, tiny_model

TABLE = schemes()
ODD = Grid(bits=3, symmetric=False, granularity="group", group_size=16)
SCHEMES = {
    "full": TABLE["w8a8-static"],
    "head": replace(TABLE["w8a8-static"], head=True),
    "dynamic": TABLE["w8a8-dynamic"],
    "weights": replace(TABLE["w4a16"], weight=ODD),
    "rotated": replace(TABLE["w4a4"], rotation="hadamard"),
    "inputs rotated": replace(TABLE["w4a4"], rotation="inputs"),
    "smoothed": replace(TABLE["w8a8-static-linear"], smooth_alpha=0.5),
    "gptq": replace(TABLE["w4a8"], rounding="gptq", weight=replace(ODD, symmetric=True)),
}


def make(kind, dtype=torch.float32):
    if kind in ("oasis", "gated_attention"):
        return tiny_model(kind, dtype=dtype)
    torch.manual_seed(0)
    # An inner width of 16 x 16: matrices of that order are made of smaller ones.
    config = tiny_config(kind, tie_word_embeddings=True, attention_bias=True, intermediate_size=256)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def batches():
    return [torch.randint(3, VOCABULARY, (2, 12), generator=torch.manual_seed(i)) for i in range(3)]


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def quantized(model, scheme: Scheme):
    return quantize(model, scheme, calibration=batches() if scheme.needs_calibration else None)


def there_and_back(model, folder):
    with quiet():
        model.save_pretrained(folder)
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return loaded


@pytest.mark.parametrize("kind", ["llama", "oasis", "gated_attention"])
@pytest.mark.parametrize("name", SCHEMES)
def test_logits_are_equal_bit_for_bit(kind, name, ids, tmp_path):
    model = make(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = quantized(model, SCHEMES[name])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    loaded = there_and_back(twin, tmp_path / "1")
    assert type(loaded) is type(model)
    assert list(quantized_sites(loaded)) == list(quantized_sites(twin))
    assert torch.equal(logits(loaded, ids), logits(twin, ids))
    again = there_and_back(loaded, tmp_path / "2")
    assert torch.equal(logits(again, ids), logits(twin, ids))
    assert again.generate(ids[:1], max_new_tokens=2).shape == (1, ids.shape[1] + 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["full", "head", "weights"])
def test_in_other_precisions(dtype, name, ids, tmp_path):
    # Through disk first: loading keeps the rotary frequencies in float32, `to` does not.
    model = there_and_back(make("llama", dtype), tmp_path / "0")
    assert model.dtype == dtype
    twin = quantized(model, SCHEMES[name])
    loaded = there_and_back(twin, tmp_path / "1")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded, ids), logits(twin, ids))


def test_the_file_holds_whole_numbers_and_the_config_says_what_they_are(tmp_path):
    twin = quantized(make("llama"), SCHEMES["head"])
    there_and_back(twin, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in quantized_sites(twin):
        if ":" not in name:
            assert f"{name}.weight" not in tensors
            assert tensors[f"{name}.weight_codes"].dtype == torch.int8
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "oasis"
    assert config["arithmetic"] == "simulated"
    assert set(config["sites"]) == set(quantized_sites(twin))
    assert Scheme.from_dict(config["scheme"]) == SCHEMES["head"]


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import LlamaForCausalLM as M; import oasis_attn",
        "import oasis_attn; from transformers import LlamaForCausalLM as M",
    ],
)
def test_loads_whichever_library_comes_first(imports, ids, tmp_path):
    twin = quantized(make("llama"), SCHEMES["full"])
    with quiet():
        twin.save_pretrained(tmp_path)
    code = (
        f"{imports}; import sys, torch; m = M.from_pretrained(sys.argv[1]);"
        f"print(m(input_ids=torch.tensor({ids.tolist()})).logits.double().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == logits(twin, ids).double().sum().item()


def test_a_loaded_model_is_not_quantised_again(tmp_path):
    loaded = there_and_back(quantized(make("llama"), SCHEMES["dynamic"]), tmp_path)
    with pytest.raises(ValueError, match="model: it is quantised already"):
        quantize(loaded, "w4a4")
