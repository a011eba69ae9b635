"""Saving and loading a quantized model is bit-exact."""

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
from oasis_attn.hub.loading import quiet
from oasis_attn.hub.prefix import compute_prefix, prefix_of, with_prefix
from oasis_attn.quantization import (
    QuantSpec,
    Scheme,
    linear_targets,
    quantize,
    quantized_modules,
    schemes,
)
from oasis_attn.quantization.hf_quantizer import OasisQuantizationConfig
from oasis_attn.quantization.quantize_checkpoint import quantize_checkpoint
from oasis_attn.quantization.quantizers import StaticQuantizer
from tiny_families import family_model
from tiny_models import VOCABULARY, tiny_config, tiny_model

TABLE = schemes()
ODD = QuantSpec(bits=3, symmetric=False, granularity="group", group_size=16)
SCHEMES = {
    "full": TABLE["w8a8-static-full"],
    "head": replace(TABLE["w8a8-static-full"], head=True),
    "dynamic": TABLE["w8a8-dynamic"],
    "weights": replace(TABLE["w4a16"], weight=ODD),
    "rotated": replace(TABLE["w4a4"], rotation="hadamard"),
    "inputs rotated": replace(TABLE["w4a4"], rotation="inputs"),
    "fitted": replace(TABLE["w4a4"], rotation="fitted", clip_ratio=0.9),
    "smoothed": replace(TABLE["w8a8-static-linear"], smooth_alpha=0.5),
    "gptq": replace(TABLE["w4a8"], rounding="gptq", weight=replace(ODD, symmetric=True)),
    "fp8": replace(TABLE["fp8-static"], targets="full"),
    "mxfp8, rotated": TABLE["mxfp8"].with_options(
        {"weight.group_size": 16, "activation.group_size": 16, "rotation": "hadamard"}
    ),
    "nvfp4, groups rotated, gptq": replace(TABLE["nvfp4"], rounding="gptq", rotation="groups"),
}


def make(kind, dtype=torch.float32):
    if kind in ("oasis", "gated_attention"):
        return tiny_model(kind, dtype=dtype)
    torch.manual_seed(0)
    # The inner width is 16 x 16, so that Hadamard matrices are built from smaller ones.
    config = tiny_config(kind, tie_word_embeddings=True, attention_bias=True, intermediate_size=256)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def batches():
    return [torch.randint(3, VOCABULARY, (2, 12), generator=torch.manual_seed(i)) for i in range(3)]


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def quantized(model, scheme: Scheme):
    return quantize(model, scheme, calibration=batches() if scheme.needs_calibration else None)


def save_and_load(model, folder, **keywords):
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
    quantized_model = quantized(model, SCHEMES[name])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    loaded = save_and_load(quantized_model, tmp_path / "1")
    assert type(loaded) is type(model)
    assert list(quantized_modules(loaded)) == list(quantized_modules(quantized_model))
    assert torch.equal(logits(loaded, ids), logits(quantized_model, ids))
    again = save_and_load(loaded, tmp_path / "2")
    assert torch.equal(logits(again, ids), logits(quantized_model, ids))
    assert again.generate(ids[:1], max_new_tokens=2).shape == (1, ids.shape[1] + 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["full", "head", "weights"])
def test_in_other_precisions(dtype, name, ids, tmp_path):
    # Save and load first: loading keeps the rotary frequencies in float32, `to` does not.
    model = save_and_load(make("llama", dtype), tmp_path / "0")
    assert model.dtype == dtype
    quantized_model = quantized(model, SCHEMES[name])
    loaded = save_and_load(quantized_model, tmp_path / "1")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded, ids), logits(quantized_model, ids))


@pytest.mark.parametrize("ignored", [None, "layers.1."])
def test_blocks_that_share_weights_have_their_own_codes(ignored, ids, tmp_path):
    model = family_model("zamba")
    block = "shared_transf.feed_forward.up_proj.weight"
    first, second = (model.get_parameter(f"model.layers.{i}.{block}") for i in (1, 3))
    assert first is second
    targets = [name for name in linear_targets(model) if not ignored or ignored not in name]
    scheme = TABLE["w4a8"].with_options({"rounding": "gptq"})
    quantized_model = quantize(model, scheme, calibration=batches(), targets=targets)
    loaded = save_and_load(quantized_model, tmp_path)
    assert torch.equal(logits(loaded, ids), logits(quantized_model, ids))


def test_the_file_has_integer_codes_and_the_config_describes_them(tmp_path):
    quantized_model = quantized(make("llama"), SCHEMES["head"])
    save_and_load(quantized_model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in quantized_modules(quantized_model):
        if ":" not in name:
            assert f"{name}.weight" not in tensors
            assert tensors[f"{name}.weight_codes"].dtype == torch.int8
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "oasis"
    assert config["arithmetic"] == "simulated"
    assert set(config["targets"]) == set(quantized_modules(quantized_model))
    assert Scheme.from_dict(config["scheme"]) == SCHEMES["head"]


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import LlamaForCausalLM as M; import oasis_attn",
        "import oasis_attn; from transformers import LlamaForCausalLM as M",
    ],
)
def test_loads_in_either_order_of_imports(imports, ids, tmp_path):
    quantized_model = quantized(make("llama"), SCHEMES["full"])
    with quiet():
        quantized_model.save_pretrained(tmp_path)
    code = (
        f"{imports}; import sys, torch; m = M.from_pretrained(sys.argv[1]);"
        f"print(m(input_ids=torch.tensor({ids.tolist()})).logits.double().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == logits(quantized_model, ids).double().sum().item()


def test_a_loaded_model_is_not_quantized_again(tmp_path):
    loaded = save_and_load(quantized(make("llama"), SCHEMES["dynamic"]), tmp_path)
    with pytest.raises(ValueError, match="model: it is already quantized"):
        quantize(loaded, "w4a4")
    foreign = make("llama")
    foreign.hf_quantizer = SimpleNamespace()
    with pytest.raises(ValueError, match="model: it is already quantized"):
        quantize(foreign, "w4a4")
    (tmp_path / "model.safetensors").unlink()  # the configuration says it
    with pytest.raises(ValueError, match=f"model: '{tmp_path}' is already quantized, by oasis;"):
        quantize_checkpoint(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", TABLE)
def test_a_model_saved_after_casts_computes_the_same(dtype, name, ids, tmp_path):
    quantized_model = quantized(make("llama"), TABLE[name])
    want = logits(quantized_model, ids)
    quantized_model.to(dtype)
    loaded = save_and_load(quantized_model, tmp_path / "1")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded, ids), logits(quantized_model, ids))
    if dtype == torch.float64:
        return  # values that were rounded to float32 stay rounded
    # After a cast back to float32, only unquantized tensors have been rounded.
    quantized_model.float()
    again = save_and_load(quantized_model, tmp_path / "2")
    assert torch.equal(logits(again, ids), logits(quantized_model, ids))
    torch.testing.assert_close(logits(again, ids), want, atol=0.1, rtol=0.1)
    for name, layer in quantized_modules(again).items():
        if ":" not in name:
            assert torch.equal(layer.weight, layer.decode(layer.codes(), torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_equals_loading_in_that_dtype(dtype, ids, tmp_path):
    quantized_model = quantized(make("llama"), SCHEMES["full"])
    loaded = save_and_load(quantized_model, tmp_path, dtype=dtype)
    assert torch.equal(logits(quantized_model.to(dtype), ids), logits(loaded, ids))


def test_scales_of_float64_are_kept_in_any_dtype(ids, tmp_path):
    quantized_model = quantized(
        save_and_load(make("llama", torch.float64), tmp_path / "0"), SCHEMES["full"]
    )
    quantized_model.float()
    name = next(iter(quantized_modules(quantized_model)))
    loaded = save_and_load(quantized_model, tmp_path / "1")
    for model in (quantized_model, loaded):
        assert model.get_submodule(name).weight_scale.dtype == torch.float64
        assert model.get_submodule(name).weight.dtype == torch.float32
    assert torch.equal(logits(loaded, ids), logits(quantized_model, ids))


def take_a_step(model, named):
    parameters = [p.requires_grad_() for n, p in model.named_parameters() if named in n]
    model(input_ids=batches()[0], labels=batches()[0]).loss.backward()
    torch.optim.SGD(parameters, lr=0.1).step()


def test_what_is_not_quantized_may_be_trained_and_resized(ids, tmp_path):
    quantized_model = quantized(make("llama"), SCHEMES["dynamic"])
    take_a_step(quantized_model, "norm")
    quantized_model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    loaded = save_and_load(quantized_model, tmp_path)
    assert torch.equal(logits(loaded, ids), logits(quantized_model, ids))


def merge_an_adapter(model):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).merge_and_unload()


def wrap_in_an_adapter(model):
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def disable_a_quantizer(model):
    next(m for m in model.modules() if isinstance(m, StaticQuantizer)).enabled = False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: take_a_step(m, "up_proj"), "up_proj.weight: it was changed after quantizing"),
        (merge_an_adapter, "q_proj.weight: it was changed after quantizing"),
        (wrap_in_an_adapter, "q_proj was replaced after quantizing"),
        (lambda m: m.resize_token_embeddings(99), "lm_head was replaced after quantizing"),
        (disable_a_quantizer, "is disabled"),
        (lambda m: m.model.layers[0].mlp.half(), "is torch.float16 in a model of torch.float32"),
        (lambda m: m.model.norm.to("meta"), "model: it is offloaded"),
    ],
)
def test_a_model_that_was_changed_is_not_saved(change, message, tmp_path):
    quantized_model = quantized(make("llama"), SCHEMES["head"])
    change(quantized_model)
    with pytest.raises(UserError, match=message):
        quantized_model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_saved_without_the_model(tmp_path):
    quantized_model = quantized(make("llama"), SCHEMES["dynamic"])
    quantized_model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with quiet():
        quantized_model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "config.json").exists()


def test_casts_of_unsaved_buffers_are_refused(tmp_path):
    quantized_model = quantized(make("gemma2"), SCHEMES["dynamic"])
    with pytest.raises(UserError, match=r"a cast changed model.embed_tokens.embed_scale"):
        quantized_model.to(torch.bfloat16).save_pretrained(tmp_path)
    early = make("llama").to(torch.bfloat16)
    with pytest.raises(UserError, match=r"cast to torch.bfloat16 before it was quantized"):
        quantized(early, SCHEMES["dynamic"]).save_pretrained(tmp_path)


def test_offloading_is_refused(tmp_path):
    with quiet():
        quantized(make("llama"), SCHEMES["dynamic"]).save_pretrained(tmp_path)
    places = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    with pytest.raises(UserError, match="device_map: a model that is quantized"), quiet():
        AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=places | {"model.layers": "disk"}, offload_folder=tmp_path / "off"
        )
    with quiet():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert len(quantized_modules(whole)) == 28


@torch.no_grad()
def test_shards_prefix_and_other_heads(ids, tmp_path):
    model = make("llama")
    rescued = with_prefix(model, compute_prefix(model, (5, 6)))
    quantized_model = quantized(rescued, SCHEMES["head"])
    with quiet():
        quantized_model.save_pretrained(tmp_path, max_shard_size="20KB")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        base = AutoModel.from_pretrained(tmp_path)
        scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        base.save_pretrained(tmp_path / "base")
        again = AutoModel.from_pretrained(tmp_path / "base")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(loaded, ids), logits(quantized_model, ids))
    for part in (base, scorer.model, again):
        assert prefix_of(part).tokens == (5, 6)
        assert torch.equal(part(input_ids=ids)[0], quantized_model.model(input_ids=ids)[0])


def test_plain_transformers_refuses_to_load_it(tmp_path):
    native, ours = make("llama"), make("oasis")
    static = quantized(native, SCHEMES["full"])
    models = {
        "quantized": static,
        "prefixed": with_prefix(native, compute_prefix(native, (5,))),
        "both": with_prefix(static, compute_prefix(native, (5,))),
        "one tensor": quantize(
            native, TABLE["w8a8-static-full"], calibration=batches(), targets=["model.norm:output"]
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


FIELDS = {"scheme": TABLE["w4a4"].to_dict(), "targets": ["lm_head"], "transforms": {}}


@pytest.mark.parametrize(
    "changes",
    [
        {"scheme": 5},
        {"scheme": {}},
        {"targets": 3},
        {"targets": [3]},
        {"transforms": ["a"]},
        {"extra": 1},
        {"arithmetic": "decimal"},
        {"prefix": {}},
        {"prefix": {"tokens": [1, 2], "shape": [3, 2, 1, 8], "tuned": False}},
        {"prefix": {"tokens": ["a"], "shape": [3, 2, 1, 8], "tuned": False}},
        {"prefix": {"tokens": [1], "shape": [3, 2, 1], "tuned": False}},
        {"prefix": {"tokens": [1], "shape": [3, 2, 1, 8], "tuned": 0}},
    ],
)
def test_malformed_configs_are_refused(changes):
    assert OasisQuantizationConfig.from_dict(FIELDS).targets == ["lm_head"]
    with pytest.raises(UserError, match=r"quantization_config: "):
        OasisQuantizationConfig.from_dict(FIELDS | changes)


def test_a_target_that_the_model_lacks_is_refused(tmp_path):
    with quiet():
        quantized(make("llama"), SCHEMES["dynamic"]).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("layers.3.mlp.up", "layers.4.mlp.up"))
    with pytest.raises(UserError, match=r"layers.4.mlp.up_proj' is not in LlamaForCausalLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
