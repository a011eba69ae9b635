"""A quantised model comes back from disk as it was, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from oasis_attn.errors import UserError
from oasis_attn.modeling.loading import quiet
from oasis_attn.modeling.prefix import compute_prefix, prefix_of, with_prefix
from oasis_attn.quantization import Grid, Scheme, quantize, quantized_sites, schemes
from oasis_attn.quantization.quantizers import StaticQuantizer
from oasis_attn.quantization.saved import SimulatedConfig
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


def there_and_back(model, folder, **keywords):
    with quiet():
        model.save_pretrained(folder)
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **keywords
        )
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
    foreign = make("llama")
    foreign.hf_quantizer = SimpleNamespace()
    with pytest.raises(ValueError, match="model: it is quantised already"):
        quantize(foreign, "w4a4")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", TABLE)
def test_after_casts_what_is_saved_is_what_is_computed(dtype, name, ids, tmp_path):
    twin = quantized(make("llama"), TABLE[name])
    want = logits(twin, ids)
    twin.to(dtype)
    loaded = there_and_back(twin, tmp_path / "1")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded, ids), logits(twin, ids))
    if dtype == torch.float64:
        return  # what float32 rounded stays as it is
    # Back in float32 only what is not quantised has been rounded.
    twin.float()
    again = there_and_back(twin, tmp_path / "2")
    assert torch.equal(logits(again, ids), logits(twin, ids))
    torch.testing.assert_close(logits(again, ids), want, atol=0.1, rtol=0.1)
    for name, layer in quantized_sites(again).items():
        if ":" not in name:
            assert torch.equal(layer.weight, layer.decode(layer.codes(), torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_is_what_loading_in_that_dtype_gives(dtype, ids, tmp_path):
    twin = quantized(make("llama"), SCHEMES["full"])
    loaded = there_and_back(twin, tmp_path, dtype=dtype)
    assert torch.equal(logits(twin.to(dtype), ids), logits(loaded, ids))


def test_scales_of_float64_are_kept_in_any_dtype(ids, tmp_path):
    twin = quantized(there_and_back(make("llama", torch.float64), tmp_path / "0"), SCHEMES["full"])
    twin.float()
    site = next(iter(quantized_sites(twin)))
    loaded = there_and_back(twin, tmp_path / "1")
    for model in (twin, loaded):
        assert model.get_submodule(site).weight_scale.dtype == torch.float64
        assert model.get_submodule(site).weight.dtype == torch.float32
    assert torch.equal(logits(loaded, ids), logits(twin, ids))


def take_a_step(model, named):
    parameters = [p.requires_grad_() for n, p in model.named_parameters() if named in n]
    model(input_ids=batches()[0], labels=batches()[0]).loss.backward()
    torch.optim.SGD(parameters, lr=0.1).step()


def test_what_is_not_quantised_may_be_trained_and_resized(ids, tmp_path):
    twin = quantized(make("llama"), SCHEMES["dynamic"])
    take_a_step(twin, "norm")
    twin.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    loaded = there_and_back(twin, tmp_path)
    assert torch.equal(logits(loaded, ids), logits(twin, ids))


def merge_an_adapter(model):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).merge_and_unload()


def wrap_in_an_adapter(model):
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def switch_a_quantiser_off(model):
    next(m for m in model.modules() if isinstance(m, StaticQuantizer)).enabled = False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: take_a_step(m, "up_proj"), "up_proj.weight: it was changed after quantising"),
        (merge_an_adapter, "q_proj.weight: it was changed after quantising"),
        (wrap_in_an_adapter, "q_proj was replaced after quantising"),
        (lambda m: m.resize_token_embeddings(99), "lm_head was replaced after quantising"),
        (switch_a_quantiser_off, "is switched off"),
        (lambda m: m.model.layers[0].mlp.half(), "is torch.float16 in a model of torch.float32"),
        (lambda m: m.model.norm.to("meta"), "model: it is offloaded"),
    ],
)
def test_a_model_that_was_changed_is_not_saved(change, message, tmp_path):
    twin = quantized(make("llama"), SCHEMES["head"])
    change(twin)
    with pytest.raises(UserError, match=message):
        twin.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_on_it_is_saved_alone(tmp_path):
    twin = quantized(make("llama"), SCHEMES["dynamic"])
    twin.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with quiet():
        twin.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "config.json").exists()


def test_casts_that_change_what_is_not_saved_are_told(tmp_path):
    twin = quantized(make("gemma2"), SCHEMES["dynamic"])
    with pytest.raises(UserError, match=r"a cast changed model.embed_tokens.embed_scale"):
        twin.to(torch.bfloat16).save_pretrained(tmp_path)
    early = make("llama").to(torch.bfloat16)
    with pytest.raises(UserError, match=r"cast to torch.bfloat16 before it was quantised"):
        quantized(early, SCHEMES["dynamic"]).save_pretrained(tmp_path)


def test_it_is_not_offloaded(tmp_path):
    with quiet():
        quantized(make("llama"), SCHEMES["dynamic"]).save_pretrained(tmp_path)
    places = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    with pytest.raises(UserError, match="device_map: a model that is quantised"), quiet():
        AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=places | {"model.layers": "disk"}, offload_folder=tmp_path / "off"
        )
    with quiet():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert len(quantized_sites(whole)) == 28


@torch.no_grad()
def test_shards_prefix_and_other_heads(ids, tmp_path):
    model = make("llama")
    rescued = with_prefix(model, compute_prefix(model, (5, 6)))
    twin = quantized(rescued, SCHEMES["head"])
    with quiet():
        twin.save_pretrained(tmp_path, max_shard_size="20KB")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        base = AutoModel.from_pretrained(tmp_path)
        scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        base.save_pretrained(tmp_path / "base")
        again = AutoModel.from_pretrained(tmp_path / "base")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(loaded, ids), logits(twin, ids))
    for part in (base, scorer.model, again):
        assert prefix_of(part).tokens == (5, 6)
        assert torch.equal(part(input_ids=ids)[0], twin.model(input_ids=ids)[0])


def test_without_our_import_it_is_not_misread(tmp_path):
    native, ours = make("llama"), make("oasis")
    static = quantized(native, SCHEMES["full"])
    models = {
        "quantised": static,
        "prefixed": with_prefix(native, compute_prefix(native, (5,))),
        "both": with_prefix(static, compute_prefix(native, (5,))),
        "one tensor": quantize(
            native, TABLE["w8a8-static"], calibration=batches(), sites=["model.norm:output"]
        ),
        "ours": quantized(ours, SCHEMES["dynamic"]),
        "ours, prefixed": with_prefix(ours, compute_prefix(ours, (5,))),
    }
    for name, model in models.items():
        with quiet():
            model.save_pretrained(tmp_path / name)
    code = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
for folder in sys.argv[1:]:
    for kind in AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel:
        try:
            kind.from_pretrained(folder)
        except (RuntimeError, ValueError):
            continue
        print(kind.__name__, "loads", folder)
assert "oasis_attn" not in sys.modules
"""
    folders = [tmp_path / name for name in models]
    done = subprocess.run(
        [sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""


FIELDS = {"scheme": TABLE["w4a4"].to_dict(), "sites": ["lm_head"], "transforms": {}}


@pytest.mark.parametrize(
    "changes",
    [
        {"scheme": 5},
        {"scheme": {}},
        {"sites": 3},
        {"sites": [3]},
        {"transforms": ["a"]},
        {"extra": 1},
        {"arithmetic": "decimal"},
        {"prefix": {}},
        {"prefix": {"tokens": [1, 2], "shape": [3, 2, 1, 8]}},
        {"prefix": {"tokens": ["a"], "shape": [3, 2, 1, 8]}},
        {"prefix": {"tokens": [1], "shape": [3, 2, 1]}},
    ],
)
def test_configs_of_another_form_are_told(changes):
    assert SimulatedConfig.from_dict(FIELDS).sites == ["lm_head"]
    with pytest.raises(UserError, match=r"quantization_config: "):
        SimulatedConfig.from_dict(FIELDS | changes)


def test_a_site_that_the_model_lacks_is_told(tmp_path):
    with quiet():
        quantized(make("llama"), SCHEMES["dynamic"]).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("layers.3.mlp.up", "layers.4.mlp.up"))
    with pytest.raises(UserError, match=r"layers.4.mlp.up_proj' is not in LlamaForCausalLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
