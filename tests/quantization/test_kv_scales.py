"""The scales of a key-value cache in FP8: what they are, and which models have none."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oasis_attn.errors import Refusal
from oasis_attn.hub.prefix import compute_prefix, with_prefix
from oasis_attn.quantization.kv_scales import check_kv_cache, kv_scales
from quantization.exported_models import DYNAMIC, make, quantized
from tiny_models import VOCABULARY

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "lfm2"])
def test_the_largest_key_and_value_of_each_layer(kind, ids, monkeypatch):
    """Of all layers that have them, also of those with a sliding window that is shorter."""
    sizes = {"layer_types": ["conv", "full_attention"] * 2} if kind == "lfm2" else {}
    model = quantized(make(kind, **sizes), DYNAMIC)
    check_kv_cache(model, ids[0])
    names = {module: name for name, module in model.named_modules()}
    attention, expected = ALL_ATTENTION_FUNCTIONS["sdpa"], {}

    def spy(module, query, key, value, *args, **kwargs):
        for letter, x in (("k", key), ("v", value)):
            expected[f"{names[module]}.{letter}_scale"] = x.abs().max().view(1) / 448
        return attention(module, query, key, value, *args, **kwargs)

    found = kv_scales(model, ids.split(1))
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
        model(input_ids=ids)
    torch.testing.assert_close(found, expected)
    assert len(found) == 2 * (2 if kind == "lfm2" else 4)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_prefix_is_computed_from_its_tokens(ids):
    """Its keys are in the cache of an engine, which has no stored prefix."""
    model = make()
    prefixed = with_prefix(model, compute_prefix(model, [5, 7]))
    read = torch.cat([torch.tensor([[5, 7]]).expand(2, -1), ids], 1)
    assert kv_scales(prefixed, [ids]) == kv_scales(model, [read])


REFUSED = {
    "gpt_neox": "compressed-tensors finds no attention layers that cache keys and values",
    "gemma4_text": r"compressed-tensors cannot apply it \('head_dim' is a per-layer attribute",
    "deepseek_v3": "model.layers.0.self_attn caches latent vectors in place of keys and values",
    "gemma3n_text": "model.layers.2.self_attn reads the cache of another layer",
    "llama4_text": "the family 'llama4_text' does not accept the library's cache",
    "whisper": "decoder.layers.0.encoder_attn stores keys and values 0 times in a forward pass",
    "recurrent_gemma": r"layers \[2\], and the model caches keys and values in the layers \[\]",
}
SIZES = {
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY},
    "gemma3n_text": {"vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 2},
    "whisper": {"decoder_attention_heads": 4, "encoder_attention_heads": 4},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_library_cannot_round_is_refused(kind, ids):
    model = make(kind, **SIZES.get(kind, {}))
    with pytest.raises(Refusal, match=f"key-value cache cannot be in FP8: .*{REFUSED[kind]}"):
        check_kv_cache(model, ids[0])
    assert not any(module._forward_pre_hooks for module in model.modules())
