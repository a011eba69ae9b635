"""llama.cpp computes what is exported; skipped without the package xllamacpp."""

from functools import partial
from statistics import median

import pytest
import torch
from experiments.engine_worker import llama_cpp
from experiments.engines import INT8, rounded_input
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from oasis_attn.hub.gguf_export import write_gguf
from oasis_attn.hub.gguf_file import read_gguf
from tokenizer_factories import TEXT, byte_level

pytest.importorskip("xllamacpp")

SIZES = {
    "vocab_size": 340, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "head_dim": 64, "initializer_range": 0.2,
}  # fmt: skip
IDS = torch.randint(3, 330, (1, 48), generator=torch.Generator().manual_seed(0))
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 16, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip


def build(kind, **changes):
    if rope := changes.get("rope_parameters"):
        changes = changes | {"rope_parameters": {"rope_theta": 10000.0, **rope}}
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(kind(**SIZES | changes), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def differences(found, wanted):
    """The largest difference of a log-probability at each place."""
    return [
        max(abs(value - float(line[int(token)])) for token, value in place.items())
        for line, place in zip(wanted, found["logprobs"][0], strict=False)
    ]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
        (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
        (MistralConfig, {"sliding_window": None, "rope_parameters": YARN}),
        (Qwen2Config, {"head_dim": 16, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
        (Qwen3Config, {"tie_word_embeddings": True, "rope_parameters": YARN}),
    ],
)
@torch.no_grad()
def test_llama_cpp_computes_the_same(tmp_path, kind, changes):
    model, tokenizer = build(kind, **changes), byte_level()
    write_gguf(model, tokenizer, tmp_path / "m.gguf", weights="f32")
    texts = [*TEXT, " a\n\n b", "na\u00efve \U0001f600", tokenizer.bos_token + "x"]
    job = {"model": str(tmp_path / "m.gguf"), "windows": IDS.tolist(), "texts": texts}
    found = llama_cpp(job)
    assert found["tokens"] == [tokenizer(text).input_ids for text in texts]
    assert max(differences(found, model(IDS).logits[0].log_softmax(-1))) < 1e-4


@pytest.mark.parametrize("weights", ["q8_0", "q4_0"])
@torch.no_grad()
def test_llama_cpp_rounds_the_inputs_of_quantized_weights(tmp_path, weights):
    model = build(LlamaConfig)
    write_gguf(model, byte_level(), tmp_path / "m.gguf", weights=weights)
    read, _ = read_gguf(tmp_path / "m.gguf")
    unrounded = read(IDS).logits[0].log_softmax(-1)
    for layer in read.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(partial(rounded_input, kind=INT8))
    found = llama_cpp({"model": str(tmp_path / "m.gguf"), "windows": IDS.tolist(), "texts": []})
    rounded = read(IDS).logits[0].log_softmax(-1)
    assert median(differences(found, rounded)) < 1e-5  # a few values lie half way between codes
    assert median(differences(found, unrounded)) > 1e-3
