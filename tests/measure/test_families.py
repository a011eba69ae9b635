"""Any decoder of transformers: diagnosed as what it computes, or refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from oasis_attn.errors import UserError
from oasis_attn.measure import diagnose
from tiny_models import VOCABULARY, tiny_config, tiny_wrapper_config

# Values narrower than keys, or a softcap: not for the fused kernel on the CPU.
pytestmark = pytest.mark.filterwarnings("ignore:null_attention falls back")

DIAGNOSED = (
    *("llama", "gemma2", "olmo2", "gpt2", "gpt_neox", "phi", "cohere"),
    *("gpt_oss", "granite_swa", "mixtral", "deepseek_v3", "llama4_text", "doge"),
    *("gemma4_text", "inkling_text"),  # a norm beside the final one; a position bias in attention
)
CHANGES = {
    "llama4_text": {"intermediate_size_mlp": 48},
    "gemma4_text": {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
        "global_head_dim": 8, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 4, "activation_sparsity_pattern": None, "altup_num_inputs": 2,
    },
    "deepseek_v32": {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16},
}  # fmt: skip
REFUSED = {
    **dict.fromkeys(("bloom", "mpt", "xglm", "gpt_neox_japanese"), "of transformers 0 times"),
    "minimax": "layers.1 has no softmax attention, but a MiniMaxLightningAttention",
    "bailing_hybrid": "layers.0 has no softmax attention, but a BailingHybridDeltaAttention",
    "diffllama": "of transformers 2 times",
    "hy_v4": "keys that an indexer selects",  # it has several streams too
    "deepseek_v32": "keys that an indexer selects",
    "gemma3n_text": r"layers.0 is \[2, 1, 20, 32\], not one vector for each",
    "mamba": "layers.0 has no softmax attention, but a MambaMixer",
    "bert": "0 modules look like its list of 4 layers",
    "jetmoe": "output projection of model.layers.0.self_attention was not found",
    "openai-gpt": "final norm was not found",
}


def build(family):
    """As the family makes it, each weight off its start."""
    config = tiny_config(family, **CHANGES.get(family, {}))
    if getattr(config, "experts_implementation", None):
        config.experts_implementation = None  # transformers' own choice
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens():
    return torch.randint(3, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", DIAGNOSED)
def test_what_is_measured_is_what_the_family_computes(family):
    model, ids = build(family), tokens()
    record = diagnose(model, ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        native = model(input_ids=ids, labels=ids, use_cache=False, output_attentions=True)
    assert record["loss.windowed"] == pytest.approx(float(native.loss), abs=1e-4)
    if family != "granite_swa":  # its eager map is that of the softmax alone, without its sinks
        mass_LH = torch.stack(
            [p_BHTS[0, :, 1:, 0].float().mean(-1) for p_BHTS in native.attentions]
        )
        torch.testing.assert_close(
            torch.tensor(record.tables["sink.mass"]), mass_LH, atol=1e-4, rtol=1e-3
        )


@pytest.mark.parametrize("family", ["gemma3", "llama4"])
def test_a_vision_language_model_is_diagnosed_by_its_text_decoder(family):
    torch.manual_seed(0)
    model, ids = AutoModelForImageTextToText.from_config(tiny_wrapper_config(family)), tokens()
    record = diagnose(model.eval(), ids)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert record["loss.windowed"] == pytest.approx(float(loss), abs=1e-4)
    assert len(record.tables["outlier.inf_norm_layer"]) == len(record.tables["sink.mass"]) == 4
    assert all(
        metric.where.startswith(("layers.", "norm"))
        for metric in record.metrics
        if metric.name == "outlier.max_inf_norm" and metric.where
    )


@pytest.mark.parametrize("family", REFUSED)
def test_others_are_refused_by_name(family):
    model = build(family)
    before = model.config._attn_implementation
    with pytest.raises(UserError, match=f"family '{family}' .*{REFUSED[family]}") as error:
        diagnose(model, tokens())
    assert "\n" not in str(error.value)
    assert model.config._attn_implementation == before
    assert not any(module._forward_hooks for module in model.modules())
