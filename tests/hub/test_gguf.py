"""GGUF files written from models whose logits are known, in llama.cpp's conventions."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.convert_slow_tokenizer import bytes_to_unicode

from oasis_attn.errors import UserError
from oasis_attn.hub import loading
from oasis_attn.hub.loading import load_model

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
IDS = torch.randint(3, 128, (1, 300), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OASIS_CACHE", str(tmp_path / "cache"))


def build(kind=LlamaConfig, **changes):
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(kind(**SIZES | changes), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def write(path, model, *, keys=None, tensors=None, without=()):
    """`model` as a GGUF file; `keys` and `tensors` besides, `without` tensors of such names."""
    config = model.config
    architecture = config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in (keys or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add.get(type(value), writer.add_string)(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*list(bytes_to_unicode().values())[:127], "ab"])
    writer.add_token_merges(["a b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 2)
    for name, tensor in model.state_dict().items():
        x = tensor.numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            pairs = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
            x = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(x.shape))
        stored = names.get_name(name, (".weight", ".bias"))
        if not stored.endswith(tuple(without) or "-"):
            writer.add_tensor(stored, x)
    for name, x in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(x, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same(path, model):
    loaded, _ = load_model(path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_a_plain_file_loads_exactly(tmp_path, kind):
    model = build(kind, head_dim=16)
    assert_same(write(tmp_path / "m.gguf", model, keys={"rope.dimension_count": 16}), model)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_another_head_width(tmp_path, kind):
    model = build(kind, head_dim=24)
    keys = {"attention.key_length": 24, "attention.value_length": 24, "rope.dimension_count": 24}
    assert_same(write(tmp_path / "m.gguf", model, keys=keys), model)
    with pytest.raises(UserError, match=r"attention\.value_length = 16 is not supported"):
        load_model(write(tmp_path / "n.gguf", model, keys=keys | {"attention.value_length": 16}))


def test_linear_scaling(tmp_path):
    model = build(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0})
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert_same(write(tmp_path / "m.gguf", model, keys=keys), model)


def test_yarn(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    model = build(rope_parameters=rope | {"rope_theta": 5000.0})
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 128,
        "rope.scaling.finetuned": True,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    }
    assert_same(write(tmp_path / "m.gguf", model, keys=keys), model)


def test_llama3_factors_become_llama3_parameters(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model = build(rope_parameters=rope)
    plain = 1 / 500000.0 ** (np.arange(8) / 8)
    factors = plain / model.model.rotary_emb.inv_freq.numpy()
    assert np.unique(factors.round(3)).size > 1
    path = write(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": factors})
    assert_same(path, model)
    assert load_model(path)[0].config.rope_parameters == rope


def test_any_other_factors(tmp_path):
    model = build()
    factors = np.linspace(1, 3, 8)
    path = write(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": factors})
    model.model.rotary_emb.inv_freq /= torch.tensor(factors)
    assert_same(path, model)
    with pytest.raises(UserError, match=r"rope_freqs\.weight = 5 factors is not supported"):
        load_model(write(tmp_path / "n.gguf", model, tensors={"rope_freqs.weight": np.ones(5)}))


def test_biases(tmp_path):
    model = build(attention_bias=True, mlp_bias=True)
    assert_same(write(tmp_path / "m.gguf", model), model)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.data.zero_()
    assert_same(write(tmp_path / "n.gguf", model, without=["attn_output.bias"]), model)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention.sliding_window": 64}, r"llama\.attention\.sliding_window = 64 is not supp"),
        ({"rope.scaling.type": "longrope"}, r"rope\.scaling\.type = longrope is not supported"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_log_multiplier": 0.1}, "log_multiplier"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_beta_fast": 8.0}, "beta_fast = 8.0 is"),
        ({"rope.dimension_count": 8, "attention.key_length": 16}, "dimension_count = 8 is not"),
        ({"logit_scale": 2.0}, r"llama\.logit_scale = 2\.0 is not supported"),
        ({"attention.causal": False}, r"llama\.attention\.causal = False is not supported"),
        ({"attention.key_length": 0}, "attention.key_length: 0 is not a number above 0"),
        ({"rope.dimension_count": "many"}, "'many' is not a number above 0"),
    ],
)
def test_keys_that_nothing_reads(tmp_path, keys, message):
    with pytest.raises(UserError, match=message) as caught:
        load_model(write(tmp_path / "m.gguf", build(), keys=keys))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_keys_that_change_nothing(tmp_path):
    model = build()
    keys = {"attention.sliding_window": 512, "rope.scaling.type": "none", "attention.causal": True}
    assert_same(write(tmp_path / "m.gguf", model, keys=keys), model)


def test_tensors_that_nothing_reads_and_tensors_that_are_absent(tmp_path):
    sinks = {"blk.0.attn_sinks.weight": np.ones(4)}
    with pytest.raises(UserError, match=r"blk\.0\.attn_sinks\.weight = a tensor of shape \[4\]"):
        load_model(write(tmp_path / "m.gguf", build(), tensors=sinks))
    path = write(tmp_path / "n.gguf", build(), without=["ffn_up.weight"])
    with pytest.raises(UserError, match=r"2 missing weights, first model\.layers\.0\.mlp\.up_proj"):
        load_model(path)


def test_sizes_that_the_file_cannot_hold(tmp_path):
    model = build()
    model.config.intermediate_size = 10**9
    with pytest.raises(UserError, match="describes a larger model than the file can hold"):
        load_model(write(tmp_path / "m.gguf", model))
    model.config.num_hidden_layers = 10**9
    with pytest.raises(UserError, match="block_count: 1000000000 is more than"):
        load_model(write(tmp_path / "n.gguf", model))


def test_half_a_file(tmp_path):
    path = write(tmp_path / "m.gguf", build())
    whole = path.read_bytes()
    for length in (3, 40, 500, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"the GGUF file .* cannot be read"):
            load_model(path)


def test_of_two_that_convert_a_file_at_once_both_get_it(tmp_path, monkeypatch):
    """The second finds the first one's folder in its place when it is done."""
    path = write(tmp_path / "m.gguf", build())
    read, folders = loading.read_gguf, []

    def interrupted(path):
        monkeypatch.setattr(loading, "read_gguf", read)
        folders.append(loading._converted(path))
        return read(path)

    monkeypatch.setattr(loading, "read_gguf", interrupted)
    folders.append(loading._converted(path))
    assert folders[0] == folders[1]
    assert [entry.name for entry in folders[0].parent.iterdir()] == [folders[0].name]
    load_model(folders[0])


def test_a_cached_conversion_is_used_again_unless_it_is_of_another_format(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", build())
    first = loading._converted(path)
    read = loading.read_gguf
    monkeypatch.setattr(loading, "read_gguf", None)
    assert loading._converted(path) == first
    monkeypatch.setattr(loading, "read_gguf", read)
    monkeypatch.setattr(loading, "_GGUF_FORMAT", loading._GGUF_FORMAT + 1)
    assert loading._converted(path) != first
